"""The house rules: who may import whom, how long a room may grow, what it may not be called, what CI may leave out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("balancer", "scheduler_hooks")
    for path in sorted((ROOT / package).rglob("*.py"))
}
CORE = {name for name, path in MODULES.items() if path.parent.name == "balancer" and path.parent.parent == ROOT}
EVERY = pytest.mark.parametrize("module", MODULES)

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 90
NO_NAMES = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
ONE_DOOR = {
    "redis": {"balancer.store", "balancer.connection"},
    "hiredis": {"balancer.blocking", "balancer.pipeline"},
    "tenacity": {"balancer.store"},
    "torch": {"scheduler_hooks.gather", "scheduler_hooks.mock_engine.process_group"},
    "sglang": {f"scheduler_hooks.sglang.{room}" for room in ("counting", "register", "shim", "targets")},
    "vllm": {"scheduler_hooks.vllm.attach"},
}
OFFERED = {"balancer.marker", "balancer.model"}
"""What the engine's side may use beside the public names of `balancer`: marks in ids, checks and limits of values."""
OFFERED_TO = {
    "scheduler_hooks.demo": {"balancer.cli", "balancer.embedded", "balancer.settings", "balancer.workload"},
    "scheduler_hooks.replay": {
        "balancer.cli",
        "balancer.workload",
        "balancer.simulator",
        *(f"balancer.simulator.{room}" for room in ("engine", "recorder", "report", "report_html", "stream")),
    },
}
"""And its two programs: a Redis of their own, made-up traffic, the simulator beside."""


def imported_by(module: str, top_level_only: bool = False) -> set[str]:
    """Dotted names of all that a module imports, inside functions too."""
    tree = ast.parse(MODULES[module].read_text())
    return {name for node in (tree.body if top_level_only else ast.walk(tree)) for name in _names(node)}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            deeper = f"{node.module}.{alias.name}"
            yield deeper if deeper in MODULES else node.module


@pytest.mark.parametrize("foreign", ONE_DOOR)
def test_a_foreign_package_comes_in_by_one_door(foreign: str) -> None:
    users = {name for name in MODULES if any(used.split(".")[0] == foreign for used in imported_by(name))}
    assert users <= ONE_DOOR[foreign]


def test_imports_point_down() -> None:
    graph = {
        name: {used for used in imported_by(name, top_level_only=True) if used in MODULES and used != name}
        for name in MODULES
        if MODULES[name].name != "__init__.py"
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert order.index("balancer.errors") < order.index("balancer.protocol") < order.index("balancer.dispatcher")


def test_the_core_imports_no_sub_package_and_no_hook() -> None:
    for name in CORE:
        strangers = {used for used in imported_by(name) if used in MODULES and used not in CORE}
        assert not strangers, f"{name} imports {strangers}"


def test_the_hooks_use_of_the_library_what_is_offered_to_them() -> None:
    for name in MODULES:
        if name.startswith("scheduler_hooks"):
            room = ".".join(name.split(".")[:2])
            strangers = {used for used in imported_by(name) if used.split(".")[0] == "balancer"} - {"balancer"}
            strangers -= OFFERED | OFFERED_TO.get(room, set())
            assert not strangers, f"{name} imports {strangers}"


def test_the_library_imports_no_hook() -> None:
    for name in MODULES:
        if name.startswith("balancer"):
            hooks = {used for used in imported_by(name) if used.split(".")[0] == "scheduler_hooks"}
            assert not hooks, f"{name} imports {hooks}"


@EVERY
def test_a_module_is_short_and_says_what_it_is_for(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))


@EVERY
def test_a_function_fits_on_a_screen(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


@EVERY
def test_a_module_has_a_name_that_says_something(module: str) -> None:
    assert not NO_NAMES & set(module.split("."))


def test_init_modules_are_tables_of_contents() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            found = {type(node).__name__ for node in body} - {"Expr", "ImportFrom", "Import", "Assign", "FunctionDef"}
            assert not found, f"{name} holds {found}"
            assert sum(isinstance(node, ast.FunctionDef) for node in body) <= 1, name


LEFT_OUT = {
    "by a test": "import pytest\ndef test_it(): pytest.skip('no trace')",
    "by a mark": "import pytest\n@pytest.mark.skipif(True, reason='no trace')\ndef test_it(): pass",
    "as a file": "import pytest\npytest.skip('no trace', allow_module_level=True)",
}


@pytest.mark.parametrize("how", LEFT_OUT)
def test_what_is_left_out_fails_in_ci_and_nowhere_else(how: str, tmp_path: Path) -> None:
    (tmp_path / "test_left_out.py").write_text(LEFT_OUT[how])
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "pyproject.toml", str(tmp_path)]

    def run(ci: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | {"CI": ci}, capture_output=True, text=True, check=False
        )

    in_ci, elsewhere = run("true"), run("")
    assert in_ci.returncode not in (0, 5), in_ci.stdout
    assert "left out, which in CI is a failure: " in in_ci.stdout
    assert "no trace" in in_ci.stdout
    assert elsewhere.returncode in (0, 5), elsewhere.stdout  # 5: a file that was left out whole held no test
    assert "1 skipped" in elsewhere.stdout
