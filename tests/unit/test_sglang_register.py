"""The entry point in an SGLang that has something wrong: it says so, attaches nothing and never raises."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scheduler_hooks.sglang import identity, register, shim, targets

URL = "redis://127.0.0.1:1/0"


class Registry:
    """SGLang's, as far as it is called."""

    def __init__(self) -> None:
        self.hooked: dict[str, Any] = {}

    def register(self, target: str, hook: Any, hook_type: Any) -> None:
        self.hooked[target] = (hook, hook_type)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An SGLang 0.5.23 that has every target."""
    registry = Registry()
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry = registry  # type: ignore[attr-defined]
    module.HookType = {"AFTER": "after", "BEFORE": "before", "AROUND": "around"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.23")
    monkeypatch.setattr(targets, "missing", lambda wanted: [])
    monkeypatch.setattr(shim, "is_needed", lambda: False)
    for name in ("DISPATCH", "HOOK", "FORM", "ENGINE"):
        monkeypatch.delenv(f"DP_BALANCER_{name}", raising=False)
    monkeypatch.setenv("DP_BALANCER_URL", URL)
    return registry


def test_unconfigured_it_does_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DP_BALANCER_URL")
    register()
    assert not registry.hooked


def test_configured_it_hooks_every_target(registry: Registry) -> None:
    register()
    assert set(registry.hooked) == {target.path for target in targets.TARGETS}
    assert {kind for _, kind in registry.hooked.values()} == {"after", "before", "around"}


def test_without_dispatch_the_controller_is_left_alone(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DP_BALANCER_DISPATCH", "0")
    register()
    assert set(registry.hooked) == {target.path for target in targets.SCHEDULER_TARGETS}


def test_without_the_hook_nothing_is_dispatched_either(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DP_BALANCER_HOOK", "0")
    monkeypatch.setenv("DP_BALANCER_DISPATCH", "1")
    register()
    assert not registry.hooked
    assert "nobody would acknowledge" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DP_BALANCER_FORM", "square", "DP_BALANCER_FORM must be one of"),
        ("DP_BALANCER_URL", "http://x", "dp-balancer is off"),
    ],
)
def test_a_wrong_variable_is_named(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    register()
    assert not registry.hooked
    assert said in caplog.text


def test_an_older_release_is_refused_by_number(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.12.post1")
    register()
    assert not registry.hooked
    assert "needs SGLang 0.5.13 or newer, not 0.5.12.post1" in caplog.text


@pytest.mark.parametrize("version", ["0.0.0.dev0", "0.0.0", "0.1.dev7+g12ab", None])
def test_a_build_without_a_number_is_judged_by_what_it_has(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str | None
) -> None:
    def told(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", told)
    register()
    assert registry.hooked
    registry.hooked.clear()
    monkeypatch.setattr(targets, "missing", lambda wanted: ["that method"])
    register()
    assert not registry.hooked
    assert f"SGLang {version or 'of unknown version'} has no that method" in caplog.text


def test_a_newer_release_is_tried_with_a_warning(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.99")
    register()
    assert registry.hooked
    assert "knows SGLang up to 0.5.23" in caplog.text


def test_a_target_that_is_gone_is_named_and_nothing_is_attached(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(targets, "missing", lambda wanted: [wanted[0].path])
    register()
    assert not registry.hooked
    assert "has no sglang.srt.managers.data_parallel_controller" in caplog.text


def test_whatever_goes_wrong_it_does_not_raise(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> str:
        raise RuntimeError("no metadata")

    monkeypatch.setattr(importlib.metadata, "version", broken)
    with caplog.at_level(logging.ERROR):
        register()
    assert "the engine goes on without" in caplog.text


def test_an_engine_on_several_nodes_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin: Any = SimpleNamespace(engine=None, address="")
    nodes = [SimpleNamespace(nnodes=2, dist_init_addr="10.0.0.5:5000", port=port) for port in (30000, 30001)]
    assert {identity.engine_name(plugin, node) for node in nodes} == {"10.0.0.5-5000"}
    # Its ranks are reached through the first node, wherever they are.
    assert [identity.address(plugin, node) for node in nodes] == ["10.0.0.5:30000", "10.0.0.5:30001"]
    six = SimpleNamespace(nnodes=2, dist_init_addr="[fd00::5]:5000", port=30000)
    assert identity.address(plugin, six) == "[fd00::5]:30000"
    monkeypatch.setattr("socket.gethostname", lambda: "gpu_7")
    alone = SimpleNamespace(nnodes=1, dist_init_addr=None, port=30000, host="0.0.0.0")
    assert identity.engine_name(plugin, alone) == "gpu_7-30000"
    assert identity.address(plugin, alone) == "gpu_7:30000"
