"""What the hook costs the step thread: `StepHook.after_step` on TP rank 0, the collective itself excluded.

The gather is replaced by one that returns 16 ranks' rows at once; intake, rows, mailbox and publisher are real, and the
publisher's thread reports to a real Redis that is up, paused (SIGSTOP) or dead. Between two steps the thread sleeps,
as a step thread waits for its GPU. A control without publisher is measured in the same loop: what it shows is the
machine's noise and the hook's own work, not Redis.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from array import array
from collections.abc import Sequence

from balancer import Reporter, Settings
from balancer.embedded import EmbeddedRedis
from scheduler_hooks import Publisher, StepHook
from scheduler_hooks.forms import GatherForm
from scheduler_hooks.intake import Counts, Share
from scheduler_hooks.row import HEADER, fill_row, new_row
from tests.bench.measuring import Row, Target, row

RANKS = 16
IDS_PER_RANK = 4
IDS_PER_GATHER = 256
STEP_US = 20_000
PAUSE_S = 0.004
STEPS_PER_ROUND = 250


def on_step_thread(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """p50 and p99 as a share of a 20 ms step, 64 ids received in each."""
    rounds = 2 if quick else 8
    publisher = Publisher(Reporter(Settings(url=server.url, pool="hook"), "sglang-0", RANKS))
    ranks = AllRanks()
    outlet = Timed(publisher)
    hook = StepHook(GatherForm(ranks, 0, RANKS, IDS_PER_GATHER, outlet))
    control = StepHook(GatherForm(ranks, 0, RANKS, IDS_PER_GATHER, Timed()))
    rows: list[Row] = []
    try:
        for state in ("up", "paused", "dead"):
            if state == "paused":
                os.kill(server.pid, signal.SIGSTOP)
            elif state == "dead":
                os.kill(server.pid, signal.SIGCONT)
                server.stop()
            measured = []
            for _ in range(rounds):
                outlet.spent_us.clear()
                spent = _round_us(ranks, hook, control)
                measured.append({"hand_over": list(outlet.spent_us), **spent})
            rows += _rows(f"Redis {state}", measured)
            failures = publisher.counters.failures
            assert state != "up" or not failures, f"{failures} reports failed though Redis is up"
    finally:
        hook.close()
    return rows


class AllRanks:
    """A gather without processes: everybody's rows are there, with new ids each time."""

    def __init__(self) -> None:
        self._next_id = 1
        self._width = HEADER + IDS_PER_GATHER
        self._rows = array("q", bytes(8 * self._width * RANKS))

    def arrive(self) -> None:
        """The other ranks' rows of the next step; before the clock starts, for this is the collective's work."""
        for rank in range(RANKS):
            ids = range(self._next_id, self._next_id + IDS_PER_RANK)
            self._next_id += IDS_PER_RANK
            row = new_row(rank, IDS_PER_GATHER)
            fill_row(row, Share((50_000 + rank, 64, 3_000, 431), list(ids)))
            self._rows[rank * self._width : (rank + 1) * self._width] = row

    def gather(self, row: array[int]) -> memoryview:
        return memoryview(self._rows)


class Timed:
    """An outlet that notes how long the publisher's `hand_over` takes; without a publisher it does nothing."""

    def __init__(self, publisher: Publisher | None = None) -> None:
        self._publisher = publisher
        self.spent_us: list[float] = []

    def hand_over(self, step: int, counts: Sequence[Counts], received: Sequence[int] = ()) -> None:
        if self._publisher:
            begun = time.perf_counter_ns()
            self._publisher.hand_over(step, counts, received)
            self.spent_us.append((time.perf_counter_ns() - begun) / 1000)

    def still_here(self, patience_s: float) -> None:
        pass

    def silence(self) -> None:
        pass

    def close(self) -> None:
        if self._publisher:
            self._publisher.close()


def _round_us(ranks: AllRanks, hook: StepHook, control: StepHook) -> dict[str, list[float]]:
    spent: dict[StepHook, list[float]] = {hook: [], control: []}
    order = [hook, control]
    for step in range(STEPS_PER_ROUND):
        received = {step * IDS_PER_RANK + at: 1_000 for at in range(IDS_PER_RANK)}
        order.reverse()  # who comes first finds colder caches
        for each in order:
            ranks.arrive()
            time.sleep(PAUSE_S)  # the GPU works
            begun = time.perf_counter_ns()
            each.after_step(50_000, 64, received, 3_000, 431)
            spent[each].append((time.perf_counter_ns() - begun) / 1000)
    assert not hook.troubles, f"the hook is in trouble: {hook.troubles}"
    return {"after_step": spent[hook], "after_step without publisher": spent[control]}


def _rows(state: str, measured: Sequence[dict[str, list[float]]]) -> list[Row]:
    rows = []
    step = [float(STEP_US)] * len(measured)
    for name in measured[0]:
        for percentile in (50, 99):
            us = [_percentile(spent[name], percentile) for spent in measured]
            is_judged = percentile == 99 and "without" not in name
            target = Target("at most", 1) if is_judged else None
            rows.append(row(f"{name}, {state}, p{percentile}", "a 20 ms step", us, step, "%", target))
    return rows


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
