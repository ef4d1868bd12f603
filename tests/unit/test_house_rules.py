"""The house rules: who may import whom, how long a room may grow, what it may not be called."""

from __future__ import annotations

import ast
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
