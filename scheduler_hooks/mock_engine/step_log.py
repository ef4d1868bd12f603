"""What rank 0 writes down of each step, for the demo to read: one JSON line per step that had work.

    {"step": 12, "t": 81.25, "duration_s": 0.027, "late_s": 0.0, "cost_ms": [24.1, …], "held": [900, …],
     "requests": [1, …]}

`t` is the step's end on the host's monotonic clock; `duration_s` is how long it really took, at the
engine's speed; of that `late_s` because the machine was too slow for the step. `cost_ms` is what the step would have
taken each rank alone by the price list (0: it had nothing to do); the largest is the step of all. `held` and
`requests` are per rank, as the step ended.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from scheduler_hooks.mock_engine.barrier import Agreement


class StepLog:
    """A file of step records, each written as its step is agreed. Raises OSError when it cannot be made."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._previous_end_ns = 0

    def __call__(self, agreement: Agreement) -> None:
        """Write one step down. Idle ones are left out: they would say that an idle engine is balanced."""
        duration_ns = agreement.end_ns - self._previous_end_ns
        self._previous_end_ns = agreement.end_ns
        if agreement.idle:
            return
        record = {
            "step": agreement.step,
            "t": agreement.end_ns / 1e9,
            "duration_s": duration_ns / 1e9,
            "late_s": agreement.late_ns / 1e9,
            "cost_ms": [row.step_ns / 1e6 for row in agreement.rows],
            "held": [row.holding_tokens for row in agreement.rows],
            "requests": [row.requests for row in agreement.rows],
        }
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
