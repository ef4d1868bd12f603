"""The scripts are what their headers say, wherever they are installed, and load on the real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import redis

from balancer import Dispatcher, InvalidInput, NoRankReason, Settings
from balancer.keys import KEY_NAMES, pool_keys
from balancer.scripts import compose, included, lua_directory, policy_names, read_part, script_names

ROOT = Path(__file__).parents[2]
LUA = lua_directory()
FILES = sorted(LUA.rglob("*.lua"))
PARTS = [path for path in FILES if path.parent != LUA]
MOST_LINES = 80
MOST_COLUMNS = 128
FORBIDDEN = {"KEYS", "SCAN", "HSCAN", "ZSCAN", "SMEMBERS", "FLUSHALL", "FLUSHDB", "EVAL", "PUBLISH", "WAIT", "SELECT"}


def name_of(path: Path) -> str:
    """The name by which an @include asks for a part."""
    return path.stem if path.parent.name == "lib" else f"{path.parent.name}/{path.stem}"


def code_of(text: str) -> str:
    """Lua without its comments."""
    return re.sub(r"--[^\n]*", "", text)


def defined_in(text: str) -> list[str]:
    return re.findall(r"^local function (\w+)", text, re.MULTILINE)


def section(script: str, label: str) -> str:
    """What the header says under KEYS, ARGV or RETURNS."""
    text = (LUA / f"{script}.lua").read_text()
    header = text[: text.index("--@include")]
    found = re.search(rf"^-- {label} +(.*?)(?=^-- [A-Z]{{4}}|\Z)", header, re.MULTILINE | re.DOTALL)
    assert found, f"{script}.lua has no {label} in its header"
    return re.sub(r"^--", "  ", found[1], flags=re.MULTILINE)


# -- header and body


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LUA)))
def test_every_file_begins_by_saying_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    subjects = re.match(r"-- ([\w, ]+): [a-z]", first, re.IGNORECASE)
    assert subjects, f"not '-- name: purpose': {first}"
    known = {path.stem, *defined_in(path.read_text())}
    assert set(subjects[1].split(", ")) <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LUA)))
def test_no_file_is_longer_than_a_person_reads_at_once(path: Path) -> None:
    lines = path.read_text().splitlines()
    code = [line for line in lines if not line.startswith("--")]
    assert len(code) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS


@pytest.mark.parametrize("script", script_names())
def test_a_header_names_the_arguments_that_the_body_unpacks(script: str) -> None:
    body = code_of((LUA / f"{script}.lua").read_text())
    documented = re.findall(r"(?:^|\n) *((?:\w+, )*\w+)  +(?=\S)", section(script, "ARGV"))
    names = [name for group in documented for name in group.split(", ")]
    unpacked = re.search(r"^local ([\w, ]+) = (?:unpack\(ARGV(?:, 1, \d+)?\)|ARGV\[1\])", body, re.MULTILINE)
    assert names == (unpacked[1].split(", ") if unpacked else [])


@pytest.mark.parametrize("script", script_names())
def test_a_header_names_every_word_that_a_reply_begins_with(script: str) -> None:
    documented = set(re.findall(r"'(\w+)'", section(script, "RETURNS")))
    code = code_of(compose(script).text)
    called = {name for name in defined_in(code) if len(re.findall(rf"\b{name}\b", code)) > 1}
    for name in set(defined_in(code)) - called:  # the other function of a part that has two
        code = re.sub(rf"^local function {name}\b.*?^end", "", code, flags=re.MULTILINE | re.DOTALL)
    returned = set(re.findall(r"return \{'(\w+)'", code)) | set(re.findall(r"local reply = \{'(\w+)'", code))
    assert returned <= documented
    assert all(f"'{word}'" in code for word in documented)


def test_the_reasons_of_dispatch_are_those_that_python_knows() -> None:
    reasons = {reason.value for reason in NoRankReason} - {"unreachable"}
    assert reasons == set(re.findall(r"'(nobody_\w+|all_\w+)'", section("dispatch", "RETURNS")))


# -- keys


def test_the_keys_are_unpacked_in_the_order_that_python_gives_them() -> None:
    unpacked = re.search(r"^local ([\w,\s]+?) = unpack\(KEYS\)", code_of(read_part("keys")), re.MULTILINE)
    assert unpacked
    assert tuple(re.split(r",\s*", unpacked[1])) == KEY_NAMES


def test_the_header_of_the_keys_describes_each_in_the_same_order() -> None:
    described = re.findall(r"^--(?: KEYS)? +(\w+) +(?:hash|sorted set)  ", read_part("keys"), re.MULTILINE)
    assert tuple(described) == KEY_NAMES


def test_all_keys_of_a_pool_carry_its_hash_tag() -> None:
    assert all(key.startswith("dpb:{chat}:") for key in pool_keys("chat"))
    assert len(set(pool_keys("chat"))) == len(KEY_NAMES) == 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LUA)))
def test_keys_come_in_by_one_door_and_no_command_walks_the_keyspace(path: Path) -> None:
    code = code_of(path.read_text())
    if path.stem != "keys":
        assert not re.search(r"\bKEYS\b", code)
        assert "redis." not in code
    assert not FORBIDDEN & set(re.findall(r"call\('(\w+)'", code))


# -- includes


def parts_of(script: str) -> list[str]:
    lines = re.findall(r"^--@include (.+)$", (LUA / f"{script}.lua").read_text(), re.MULTILINE)
    return [part for line in lines for part in included(line)]


def test_every_part_is_included_by_some_script() -> None:
    assert {part for script in script_names() for part in parts_of(script)} == {name_of(path) for path in PARTS}


@pytest.mark.parametrize("script", script_names())
def test_a_script_includes_what_it_uses_before_it_uses_it_and_nothing_else(script: str) -> None:
    code = re.sub(r"'[^'\n]*'", "''", code_of(compose(script).text))
    owner = {name: name_of(path) for path in PARTS for name in defined_in(path.read_text())}
    for name, part in owner.items():
        uses = [match.start() for match in re.finditer(rf"\b{name}\b", code)]
        defined = re.search(rf"local function (?={name}\b)", code)
        assert not uses or (defined and uses[0] == defined.end()), f"{name} of {part} is used before it is there"
    for part in parts_of(script):
        names = defined_in(read_part(part))
        assert not names or any(len(re.findall(rf"\b{name}\b", code)) > 1 for name in names), f"{part} is not used"


def test_composing_replaces_every_include() -> None:
    for script in script_names():
        assert "--@include" not in compose(script).text


def test_a_script_that_is_not_there_is_called_by_its_name() -> None:
    with pytest.raises(InvalidInput, match="no script 'explode': there are configure, dispatch"):
        compose("explode")


def test_every_policy_is_one_that_dispatch_offers() -> None:
    offered = re.search(r"POLICIES = \{(.+?)\}", read_part("policies"), re.DOTALL)
    assert offered
    assert sorted(re.findall(r"(\w+) =", offered[1])) == policy_names()


# -- on the server


@pytest.mark.parametrize("script", script_names())
def test_every_script_loads_under_the_name_that_we_compute(script: str, client: redis.Redis) -> None:
    composed = compose(script)
    assert client.script_load(composed.text) == composed.sha


def test_a_server_that_has_forgotten_the_scripts_goes_unnoticed(settings: Settings, client: redis.Redis) -> None:
    with Dispatcher(settings) as dispatcher:
        for number in range(3):
            client.script_flush()
            assert dispatcher.release(f"r{number}") == 0
        assert dispatcher.counters.outages == 0


# -- in a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_carries_exactly_the_scripts_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {
            name.removeprefix("balancer/lua/"): archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith("balancer/lua/") and name.endswith(".lua")
        }
        names = archive.namelist()
    assert carried == {str(path.relative_to(LUA)): path.read_text() for path in FILES}
    assert "balancer/py.typed" in names
    assert not [name for name in names if not re.match(r"balancer/|scheduler_hooks/|dp_balancer-", name)]


def test_an_installed_wheel_finds_its_scripts_and_imports_no_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import sys, balancer, balancer.scripts as scripts\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "print(balancer.__file__, scripts.lua_directory(), len(scripts.compose('dispatch').text))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert said[:2] == [str(tmp_path / "balancer/__init__.py"), str(tmp_path / "balancer/lua")]
    assert int(said[2]) == len(compose("dispatch").text)
