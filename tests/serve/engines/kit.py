"""Real engines for the tests beside this: started by the kits in ../shared/engines, plain or with our plugin inside."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serve.replica import free_port

ROOT = Path(__file__).parents[3]
KITS = ROOT.parent / "shared" / "engines"
HOME = Path(os.environ.get("ENGINES_HOME", Path.home() / ".cache" / "engines"))
RANKS = 2
"""Of each engine."""
GROUPS = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}


def need(kind: str, with_plugin: bool = False) -> None:
    """Skip where the engine is not there, or without our plugin; in CI that is a failure."""
    venv = Path(os.environ.get(f"{kind.upper()}_VENV", HOME / kind))
    reason = ""
    if not (venv / ".engines-kit").exists():
        reason = f"{kind} is not installed in {venv}: run ../shared/engines/{kind}/install"
    elif with_plugin:
        probe = f"from importlib.metadata import entry_points as e; print([p.name for p in e(group={GROUPS[kind]!r})])"
        found = subprocess.run([venv / "bin" / "python", "-c", probe], capture_output=True, text=True, check=True)
        if "dp_balancer" not in found.stdout:
            reason = f"dp-balancer is not installed beside {kind}: run {venv}/bin/python -m pip install -e ."
    if reason:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


@contextmanager
def running(kind: str, **environment: str) -> Iterator[str]:
    """An engine with two ranks; yields its address. `environment`: DP_BALANCER_URL and so on, for our plugin."""
    port = str(free_port())
    ours = {"SGLANG_PLUGINS": "dp_balancer" if environment else "none"} if kind == "sglang" else {}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DP_BALANCER_")}
    # A second SGLang on two cores takes four minutes: the idle ranks of the first look for work all the time.
    clean.setdefault("READY_S", "600")
    started = subprocess.run(
        [KITS / kind / "serve", port, *([str(RANKS)] if kind == "vllm" else [])],
        env={**clean, **ours, **environment},
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([KITS / kind / "stop", port], check=True, capture_output=True)
