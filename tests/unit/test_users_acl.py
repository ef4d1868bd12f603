"""docker/redis/users.acl gives each user the commands that its scripts use, and no others that touch a key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balancer.scripts import load_script

LISTED = Path(__file__).parents[2] / "docker" / "redis" / "users.acl"
SCRIPTS = {
    "dispatcher": ("dispatch", "release", "renew", "snapshot", "join", "report"),
    "hook": ("join", "report", "leave"),
}
"""`balancer serve` joins and reports for engines that have no hook."""
BESIDE = {"eval", "evalsha", "ping"}


def rules(user: str) -> list[str]:
    for line in LISTED.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"user {user} "):
            return line.split()[2:]
    raise AssertionError(f"no user {user}")


def used(*scripts: str) -> set[str]:
    texts = (load_script(script).text for script in scripts)
    return {name.lower() for text in texts for name in re.findall(r"\bcall\('([A-Z]+)'", text)}


@pytest.mark.parametrize("user", SCRIPTS)
def test_a_user_may_run_what_its_scripts_use_and_nothing_else(user: str) -> None:
    allowed = {rule[1:] for rule in rules(user) if rule.startswith("+")}
    wanted = " ".join(f"+{name}" for name in sorted(used(*SCRIPTS[user]) | BESIDE))
    assert allowed == used(*SCRIPTS[user]) | BESIDE, f"in docker/redis/users.acl, {user} should have: {wanted}"


@pytest.mark.parametrize("user", ["dispatcher", "hook", "reader"])
def test_a_user_reaches_this_projects_keys_only(user: str) -> None:
    assert [rule for rule in rules(user) if rule[0] in "~%&"] == ["~dpb:*"]
    assert {"on", "resetchannels", "-@all"} <= set(rules(user))
    assert not [rule for rule in rules(user) if rule.startswith("+@")]


def test_nobody_logs_in_as_default_which_keeps_its_rights_for_the_append_only_file() -> None:
    # Redis 7.0 loads the file as `default`, and refuses its MULTIs (every script's writes) to one without rights.
    assert rules("default") == ["off", "~*", "&*", "+@all"]


def test_the_file_holds_no_password() -> None:
    text = LISTED.read_text(encoding="utf-8")
    assert not re.search(r"\s[>#]", text)
    assert re.findall(r"@([a-z]+)@", text) == ["admin", "dispatcher", "hook", "reader", "replica", "sentinel"]
