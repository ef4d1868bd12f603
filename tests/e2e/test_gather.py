"""The hook in real processes: gloo between them, a real Redis behind them, a dispatcher that looks on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from balancer import Dispatcher, EngineState, PoolSnapshot, Request, Settings, UnknownPool, in_flight_id, protocol
from balancer.store import Store

pytest.importorskip("torch")

Eventually = Callable[..., None]
Given = dict[int, tuple[int, int, dict[int, int]]]

PROGRAM = Path(__file__).with_name("gather_ranks.py")
TWO_RANKS_OF_TWO_PROCESSES: list[dict[str, Any]] = [{"rank_index": index} for index in (0, None, 1, None)]
END_S = 20.0


class Engine:
    """The processes, and a dispatcher's look at what they report."""

    def __init__(self, process: subprocess.Popen[bytes], settings: Settings, processes: int) -> None:
        self.process, self.processes = process, processes
        self.dispatcher = Dispatcher(settings)

    def hear(self) -> list[dict[str, Any]]:
        """One line of each process, in the order of processes."""
        assert self.process.stdout
        lines = [json.loads(self.process.stdout.readline() or "null") for _ in range(self.processes)]
        assert all(lines), "the processes have ended"
        return sorted(lines, key=lambda line: line["process"])

    def step(self, given: Given | None = None, times: int = 1) -> None:
        """Order steps; does not wait. `given` by process: holding tokens, requests, received ids with their tokens."""
        self._order(do="step", times=times, given=given or {})

    def close(self) -> list[dict[str, Any]]:
        """Close the hooks; returns their counters."""
        self._order(do="close")
        return self.hear()

    def end(self) -> int:
        """Let the processes end, and wait for it; the exit code."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(END_S)

    def snapshot(self) -> PoolSnapshot | None:
        with suppress(UnknownPool):
            return self.dispatcher.snapshot()
        return None

    def step_in_redis(self) -> int:
        snapshot = self.snapshot()
        return max((engine.step for engine in snapshot.engines), default=-1) if snapshot else -1

    def ranks_in_redis(self) -> int:
        snapshot = self.snapshot()
        return len(snapshot.ranks) if snapshot else 0

    def _order(self, **order: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()


@contextmanager
def engine(
    settings: Settings, tmp_path: Path, processes: Sequence[dict[str, Any]], form: str = "gather", **hook: object
) -> Iterator[Engine]:
    plan = {"url": settings.url, "form": form, "meeting": str(tmp_path / "meeting"), "hook": hook}
    command = [sys.executable, str(PROGRAM), json.dumps(plan | {"processes": list(processes)})]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        running = Engine(process, settings, len(processes))
        try:
            yield running
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            running.dispatcher.close()


def book(engine: Engine, count: int, tokens: int, index_at: dict[int, int]) -> Given:
    """Dispatch `count` requests; what the processes will say that they received and hold."""
    received: dict[int, dict[int, int]] = {process: {} for process in index_at.values()}
    for answer in engine.dispatcher.dispatch_many(Request(f"r{at}", tokens) for at in range(count)):
        assert not isinstance(answer, Exception)
        received[index_at[answer.index]][in_flight_id(answer.request.request_id)] = tokens
    return {process: (tokens * len(ids), len(ids), ids) for process, ids in received.items()}


def test_five_thousand_ids_of_one_step_all_arrive_and_the_load_is_exact_throughout(
    settings: Settings, tmp_path: Path, eventually: Eventually
) -> None:
    with engine(settings, tmp_path, TWO_RANKS_OF_TWO_PROCESSES, size=2, ids_per_gather=256) as four:
        four.hear()
        eventually(lambda: four.ranks_in_redis() == 2, "the engine has joined with its two ranks", 30.0)
        given = book(four, 5_000, 10, {0: 0, 1: 2})
        # The processes that lead nothing are told the same, as a tensor-parallel rank's processes are.
        given |= {1: given[0], 3: given[2]}
        four.step(given)
        ids_left = 5_000
        for step in range(1, 12):
            eventually(lambda step=step: four.step_in_redis() == step, f"step {step} arrives")
            snapshot = four.dispatcher.snapshot()
            ids_left = max(0, ids_left - 512)
            assert [rank.load_tokens for rank in snapshot.ranks] == [25_000, 25_000]
            assert sum(rank.in_flight_requests + rank.requests for rank in snapshot.ranks) == 5_000
            assert snapshot.bookings == ids_left
            four.step({process: (tokens, requests, {}) for process, (tokens, requests, _) in given.items()})
        assert ids_left == 0
        four.close()
        assert four.ranks_in_redis() == 0, "a closed engine has left"
        assert four.end() == 0


def test_a_cadence_of_three_reports_the_steps_1_4_7_and_keeps_ids_for_them(
    settings: Settings, tmp_path: Path, eventually: Eventually
) -> None:
    with engine(settings, tmp_path, [{"rank_index": 0}, {"rank_index": 1}], size=2, every=3, heartbeat_s=60) as two:
        two.hear()
        eventually(lambda: two.ranks_in_redis() == 2, "the engine has joined", 30.0)
        given = book(two, 6, 10, {0: 0, 1: 1})
        two.step()
        eventually(lambda: two.step_in_redis() == 1, "step 1 arrives")
        two.step(given)
        two.step({process: (tokens, requests, {}) for process, (tokens, requests, _) in given.items()}, times=2)
        eventually(lambda: two.step_in_redis() == 4, "step 4 arrives")
        snapshot = two.dispatcher.snapshot()
        assert (snapshot.bookings, [rank.load_tokens for rank in snapshot.ranks]) == (0, [30, 30])
        first, second = two.close()
        assert first["published"] == 3, "its joining and the steps 1 and 4"
        assert second["published"] is None
        assert two.end() == 0


def test_leaders_that_report_alone_need_no_group(settings: Settings, tmp_path: Path, eventually: Eventually) -> None:
    with engine(settings, tmp_path, [{"index": index} for index in range(4)], form="leader") as four:
        four.hear()
        eventually(lambda: four.ranks_in_redis() == 4, "all four have joined", 30.0)
        given = book(four, 400, 10, {index: index for index in range(4)})
        four.step(given)
        eventually(lambda: four.dispatcher.snapshot().bookings == 0, "all ids arrive")
        ranks = four.dispatcher.snapshot().ranks
        assert [(rank.holding_tokens, rank.in_flight_tokens) for rank in ranks] == [(1_000, 0)] * 4
        four.close()
        assert four.ranks_in_redis() == 0
        assert four.end() == 0


def test_a_killed_process_ends_the_reports_by_the_lease_and_hangs_nobody(
    settings: Settings, tmp_path: Path, eventually: Eventually
) -> None:
    with engine(settings, tmp_path, TWO_RANKS_OF_TWO_PROCESSES, size=2, heartbeat_s=0.05) as four:
        pids = [line["pid"] for line in four.hear()]
        four.step()
        eventually(lambda: four.step_in_redis() == 1, "a step arrives", 30.0)
        store = Store(settings)
        store.run(protocol.configure(settings.pool, {"engine_lease_ms": 200}))
        store.close()
        os.kill(pids[3], signal.SIGKILL)
        four.step(times=50)
        eventually(
            lambda: [engine.state for engine in four.dispatcher.snapshot().engines] == [EngineState.SILENT],
            "the lease ends the engine",
        )
        assert four.end() == 0
        assert four.ranks_in_redis() == 0


@pytest.mark.parametrize(
    ("second", "says"), [({"every": 2}, "every must be the same"), ({"heartbeat_s": 0}, "heartbeat")], ids=str
)
def test_what_would_hang_later_is_an_error_of_all_processes_at_the_start(
    settings: Settings, tmp_path: Path, second: dict[str, Any], says: str
) -> None:
    with engine(settings, tmp_path, [{"rank_index": 0}, {"rank_index": 1} | second], size=2) as two:
        errors = [line["error"] for line in two.hear()]
        assert all(error.startswith("InvalidInput") for error in errors)
        assert any(says in error for error in errors)
        assert two.end() == 0
