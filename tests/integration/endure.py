"""One fault under load, from beginning to end: what was asked, what Redis placed, how long it did not, what is left."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tests.integration.stack import BOOKING_LEASE_MS, Stack, added, wait_until

RATE = 30
"""Requests per second of each of three dispatchers."""
BUDGET_MS = 200
"""Time budget of a dispatch in these tests (compose.tests.yml); the default of 100 ms is tight on crowded cores."""
WARM_S = 1.5
"""Load before the fault: a dispatcher brings the loads of all ranks, to fall back on, once a second."""
SLACK_MS = 800
"""What two crowded cores may add to an answer, `crowd` times."""
AFTER_S = 1.5


@dataclass(frozen=True)
class Endured:
    """What three dispatchers and a watcher saw. `recovery_ms` is from the fault's end to the first request that Redis
    placed, `empty_ms` from the last end of a request to an empty pool."""

    counted: list[dict[str, Any]]
    held_ms: float
    empty_ms: float
    looks: int
    mistakes: list[str]
    expired: int
    logs: str

    def sum(self, *path: str) -> int:
        """A count over all dispatchers."""
        return added(self.counted, *path)

    @property
    def asked(self) -> int:
        return self.sum("asked")

    @property
    def slowest_ms(self) -> float:
        """The slowest answer of any dispatcher, by Redis or by the fallback."""
        return float(max(one["dispatch_ms"]["max"] for one in self.counted))

    @property
    def without_redis_ms(self) -> float:
        """The longest time in which some dispatcher had nothing placed by Redis."""
        return max((outage["ms"] for one in self.counted for outage in one["outages"]), default=0.0)

    @property
    def recovery_ms(self) -> float:
        return max(0.0, self.without_redis_ms - self.held_ms)

    def __str__(self) -> str:
        parts = [f"{self.asked} asked", f"{self.sum('answers', 'fallback')} by fallback"]
        reasons: Counter[str] = sum((Counter(one["no_rank"]) for one in self.counted), Counter())
        parts += [f"{count} {reason}" for reason, count in reasons.items()]
        for what in ("lost", "not_sent", "rejected"):
            if count := self.sum("ends", what):
                parts.append(f"{count} {what}")
        parts += [
            f"slowest answer {self.slowest_ms:.0f} ms",
            f"without Redis {self.without_redis_ms:,.0f} ms",
            f"empty after {self.empty_ms:,.0f} ms",
        ]
        if self.expired:
            parts.append(f"{self.expired} bookings left to their lease")
        return ", ".join(parts)


def endure(stack: Stack, fault: AbstractContextManager[object], hold_s: float, after_s: float = AFTER_S) -> Endured:
    """Three dispatchers place requests; `fault` befalls them for `hold_s`; they go on, and stop; the pool gets empty.

    Asserts what no fault may break: no look at the pool shows a mistake, and every request has an answer and an end.
    """
    with stack.watch() as watch:
        wait_until(lambda: watch.sees("is_idle"), "the pool is idle before the fault")
        expired = watch.look().expired
        runs = [stack.traffic(container, RATE) for container in stack.dispatchers]
        try:
            for run in runs:
                run.wait_ready()
            time.sleep(WARM_S)
            with fault:
                began_s = time.monotonic()
                time.sleep(hold_s)
            held_ms = (time.monotonic() - began_s) * 1e3
            time.sleep(after_s)
            counted = [run.stop() for run in runs]
        finally:
            for run in runs:
                run.kill()
        within_s = BOOKING_LEASE_MS / 1000 + 8
        empty_ms = wait_until(lambda: watch.sees("is_empty"), "the pool is empty after the fault", within_s)
        left = watch.look().expired
    endured = Endured(
        counted,
        held_ms,
        empty_ms,
        watch.looks,
        watch.mistakes,
        left - expired if left >= expired else left,
        "".join(run.log for run in runs),
    )
    assert not endured.mistakes, endured.mistakes[:5]
    answers = sum(sum(one["answers"].values()) for one in counted)
    assert answers == endured.asked, f"{endured.asked - answers} requests had no answer"
    # One whose very last answer was late is back all the same.
    lasting_ms = held_ms + after_s * 1e3 / 2
    away = [
        run.container
        for run, one in zip(runs, counted, strict=True)
        if one["is_away"] and one["outages"][-1]["ms"] > lasting_ms
    ]
    assert not away, f"{away} do not have Redis again: {endured}"
    assert endured.sum("open") == 0, f"{endured.sum('open')} requests had no end: {endured}"
    assert endured.sum("ends", "rejected") == 0, "an engine got a request twice"
    return endured
