"""A second plugin, beside ours, that takes the time of what ours does inside SGLang; for measurements only.

Found by SGLang where this folder is on PYTHONPATH. Writes DPB_PROBE_DIR/PID.json, {what: [seconds, …]}, as it goes.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from functools import wraps
from pathlib import Path
from typing import Any

MOST, EVERY = 20_000, 200
_taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))
_calls = 0


def register() -> None:
    folder = os.environ.get("DPB_PROBE_DIR")
    if not folder:
        return
    from balancer import Dispatcher
    from scheduler_hooks.gather import TorchGather
    from scheduler_hooks.publisher import Publisher
    from scheduler_hooks.sglang.counting import Counting
    from scheduler_hooks.step_hook import StepHook

    file = Path(folder) / f"{os.getpid()}.json"
    for owner, name, what in (
        (Counting, "held", "counting"),
        (StepHook, "after_step", "after_step"),
        (TorchGather, "gather", "gather"),
        (Publisher, "hand_over", "hand_over"),
        (Dispatcher, "dispatch_many", "dispatch"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), what, file))


def _timed(function: Any, what: str, file: Path) -> Any:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _note(what, time.perf_counter() - began, file)

    return timed


def _note(what: str, seconds: float, file: Path) -> None:
    global _calls
    _taken[what].append(seconds)
    _calls += 1
    if _calls % EVERY == 0:
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({name: list(values) for name, values in _taken.items()}))
        fresh.rename(file)
