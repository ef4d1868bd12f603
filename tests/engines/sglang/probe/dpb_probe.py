"""A second plugin, beside ours, that takes the time of what ours does inside SGLang; for tests and measurements only.

Found by SGLang where this folder is on PYTHONPATH.

DPB_PROBE_DIR   adds to PID.jsonl there a line {what: [seconds, …]} now and then; in a SGLang without dp-balancer the
                controller's time alone, to compare with
DPB_OVERLAP=1   takes back the flag by which the kit switches SGLang's overlap scheduling off, and says when a scheduler
                enters that loop
DPB_PAGEABLE=1  a prefill server hands its indices to the KV transfer by SGLang's path without memory pinned for a GPU
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
EVERY_S = 1.0
OUTERMOST = ("counting", "controller")
"""What no other time has in it: writing the file after these is in nobody's."""
_taken: dict[str, list[float]] = defaultdict(list)
_written_s = 0.0


def register() -> None:
    if os.environ.get("DPB_OVERLAP") == "1":
        _with_overlap()
    if os.environ.get("DPB_PAGEABLE") == "1":
        _with_pageable_memory()
    if folder := os.environ.get("DPB_PROBE_DIR"):
        _with_times(folder)


def _with_overlap() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def arguments(argv: list[str]) -> tuple[tuple[list[str]], dict[str, Any]]:
        return ([word for word in argv if word != "--disable-overlap-schedule"],), {}

    def entered(scheduler: Any) -> None:
        logging.getLogger("dpb_probe").warning("%s: the overlap loop", type(scheduler).__name__)

    HookRegistry.register("sglang.srt.server_args.prepare_server_args", arguments, HookType.BEFORE)
    HookRegistry.register(f"{SCHEDULER}.event_loop_overlap", entered, HookType.BEFORE)


def _with_pageable_memory() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def entered(scheduler: Any) -> None:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        MooncakeKVSender.supports_host_tensor_indices = False

    HookRegistry.register(f"{SCHEDULER}.event_loop_normal_disagg_prefill", entered, HookType.BEFORE)


def _with_times(folder: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from balancer import Dispatcher
    from scheduler_hooks.gather import TorchGather
    from scheduler_hooks.publisher import Publisher
    from scheduler_hooks.sglang.counting import Counting
    from scheduler_hooks.sglang.tally import Tally
    from scheduler_hooks.step_hook import StepHook

    file = Path(folder) / f"{os.getpid()}.jsonl"
    for owner, name, what in (
        (Counting, "held", "counting"),
        (StepHook, "after_step", "after_step"),
        (TorchGather, "gather", "gather"),
        (Publisher, "hand_over", "hand_over"),
        (Dispatcher, "dispatch_many", "dispatch"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), what, file))
    Tally.placed = _counted(Tally.placed, "by the pool")  # type: ignore[method-assign]
    Tally.left = _counted(Tally.left, "by SGLang")  # type: ignore[method-assign]

    def before_its_table_is_made(controller: Any) -> None:
        """All hooks are in place by now, so this is around them, and around SGLang's own method without them."""
        kind = type(controller)
        kind.dispatching_with_trace = _timed(kind.dispatching_with_trace, "controller", file)

    HookRegistry.register(f"{CONTROLLER}.init_dispatcher", before_its_table_is_made, HookType.BEFORE)


def _timed(function: Any, what: str, file: Path) -> Any:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _note(what, time.perf_counter() - began, file)

    return timed


def _counted(function: Any, what: str) -> Any:
    """As often as it is told of so many requests; a number, not a time."""

    @wraps(function)
    def counted(tally: Any, *args: Any) -> None:
        _taken[what].append(float(args[1]) if len(args) > 1 else 1.0)
        function(tally, *args)

    return counted


def _note(what: str, seconds: float, file: Path) -> None:
    global _written_s
    _taken[what].append(seconds)
    if what in OUTERMOST and time.monotonic() - _written_s > EVERY_S:
        _written_s = time.monotonic()
        with file.open("a") as lines:
            lines.write(json.dumps(_taken) + "\n")
        _taken.clear()
