"""The cast of the SGLang plugin's tests: what stands in for SGLang's own modules."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest

from scheduler_hooks.sglang.targets import Target


def hook_all_but_the_first(monkeypatch: pytest.MonkeyPatch, hooked: Sequence[Target]) -> None:
    """A registry of SGLang's in which the first of these targets has not been hooked."""
    registry = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        _patched={target.path: object() for target in hooked[1:]}
    )
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
