"""A user's own scheduler class for `vllm serve --scheduler-cls audit.AuditedScheduler`, which checks the hook.

Runs inside each EngineCore. At every hand-over of the hook it writes a line to $VLLM_AUDIT/RANK.jsonl: what the hook
said beside what the scheduler's requests sum up to, counted from nothing. The test compares the two, and Redis to them.
$VLLM_AUDIT/RANK.reports has a line for each report to Redis: step, when it began, how long it took, how long its thread
computed and how long it waited for a CPU (ms).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from scheduler_hooks.publisher import Publisher
from scheduler_hooks.step_hook import StepHook


def own_sums(scheduler: Scheduler) -> tuple[int, int, int, int]:
    """A scheduler's unfinished requests: their tokens, their number, the tokens that no step has taken up; KV usage."""
    live = [request for request in scheduler.requests.values() if not request.is_finished()]
    pending = 0
    for request in live:
        runs = request.status == RequestStatus.RUNNING
        if request.is_prefill_chunk if runs else request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            pending += max(0, request.num_tokens - request.num_computed_tokens)
    usage = round(1_000 * scheduler.kv_cache_manager.usage)
    return sum(request.num_tokens for request in live), len(live), pending, usage


def thread_times_s() -> list[float]:
    """How long this thread has computed, and has been ready to and got no CPU."""
    computed_ns, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return [int(computed_ns) / 1e9, int(waited_ns) / 1e9]


class AuditedScheduler(Scheduler):
    """vLLM's scheduler, which watches its own hook."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank = self.vllm_config.parallel_config.data_parallel_index
        lines = (Path(os.environ["VLLM_AUDIT"]) / f"{rank}.jsonl").open("a", buffering=1)
        self.turn = 0
        after_step = StepHook.after_step

        def audited(hook: StepHook, *said: Any) -> None:
            after_step(hook, *said)
            tokens, requests, received, *known = said
            line = [hook._step, [tokens, requests, *known], own_sums(self), len(received)]
            lines.write(json.dumps([*line, round(time.time() * 1000), self.turn]) + "\n")

        StepHook.after_step = audited  # type: ignore[method-assign]
        reports = (Path(os.environ["VLLM_AUDIT"]) / f"{rank}.reports").open("a", buffering=1)
        publish = Publisher._publish

        def timed(publisher: Publisher) -> float:
            before = [time.time(), *thread_times_s()]
            try:
                return publish(publisher)
            finally:
                took = [after - begun for after, begun in zip([time.time(), *thread_times_s()], before, strict=True)]
                reports.write(json.dumps([publisher._step, *(round(s * 1e3, 1) for s in (before[0], *took))]) + "\n")

        Publisher._publish = timed  # type: ignore[method-assign]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Count the scheduler's own steps; the hook hands over at ends of requests too."""
        self.turn += 1
        return super().schedule(*args, **kwargs)
