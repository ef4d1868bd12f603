"""A user's own scheduler class for `vllm serve --scheduler-cls audit.AuditedScheduler`, which checks the hook.

Runs inside each EngineCore. At every hand-over of the hook it writes a line to $VLLM_AUDIT/RANK.jsonl: what the hook
said beside what the scheduler's requests sum up to, counted from nothing. The test compares the two, and Redis to them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from scheduler_hooks.step_hook import StepHook


def own_sums(scheduler: Scheduler) -> tuple[int, int]:
    """Tokens and number of a scheduler's unfinished requests."""
    tokens = [request.num_tokens for request in scheduler.requests.values() if not request.is_finished()]
    return sum(tokens), len(tokens)


class AuditedScheduler(Scheduler):
    """vLLM's scheduler, which watches its own hook."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank = self.vllm_config.parallel_config.data_parallel_index
        lines = (Path(os.environ["VLLM_AUDIT"]) / f"{rank}.jsonl").open("a", buffering=1)
        after_step = StepHook.after_step

        def audited(hook: StepHook, tokens: int, requests: int, received: dict[int, int]) -> None:
            after_step(hook, tokens, requests, received)
            line = [hook._step, tokens, requests, *own_sums(self), len(received), round(time.time() * 1000)]
            lines.write(json.dumps(line) + "\n")

        StepHook.after_step = audited  # type: ignore[method-assign]
