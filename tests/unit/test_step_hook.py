"""The step hook on the step thread: the carry's arithmetic, the cadence, bad input, a collective that fails.

N ranks step in one process over a gather that is a list; what Redis makes of it is tested elsewhere.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer import InvalidInput, Settings
from scheduler_hooks import StepHook
from scheduler_hooks.forms import GatherForm, LeaderForm
from scheduler_hooks.intake import Counts, Intake
from scheduler_hooks.step_hook import check_plans


@dataclass
class Outbox:
    """An outlet that keeps what it is handed."""

    reports: list[tuple[int, list[Counts], list[int]]] = field(default_factory=list)
    silenced: bool = False
    closed: int = 0

    def hand_over(self, step: int, counts: Sequence[Counts], received: Sequence[int] = ()) -> None:
        self.reports.append((step, list(counts), list(received)))

    def still_here(self, patience_s: float) -> None:
        pass

    def silence(self) -> None:
        self.silenced = True

    def close(self) -> None:
        self.closed += 1


class Table:
    """A gather within one process: everybody lays down a row, and process 0, which comes last, takes them all."""

    def __init__(self, processes: int) -> None:
        self.rows: list[array[int]] = [array("q")] * processes
        self.calls = [0] * processes

    def seat(self, position: int) -> _Seat:
        return _Seat(self, position)


class _Seat:
    def __init__(self, table: Table, position: int) -> None:
        self._table, self._position = table, position

    def gather(self, row: array[int]) -> memoryview | None:
        self._table.calls[self._position] += 1
        self._table.rows[self._position] = array("q", row)
        if self._position:
            return None
        return memoryview(array("q", [number for one in self._table.rows for number in one]))


class Engine:
    """Processes that step together; `leads[p]` is the rank that process p leads, or None."""

    def __init__(self, leads: Sequence[int | None], ids_per_gather: int = 4, every: int = 1) -> None:
        size = len([rank for rank in leads if rank is not None])
        self.leads, self.outbox, self.table = leads, Outbox(), Table(len(leads))
        self.hooks = [
            StepHook(
                GatherForm(self.table.seat(at), rank, size, ids_per_gather, self.outbox if at == 0 else None),
                every,
            )
            for at, rank in enumerate(leads)
        ]

    def step(self, given: Mapping[int, tuple[Any, Any, Any]]) -> None:
        """One step; `given` by rank. A process that leads no rank is given its rank's numbers like its leader."""
        for at in reversed(range(len(self.leads))):
            rank = self.leads[at]
            self.hooks[at].after_step(*given.get(-1 if rank is None else rank, (0, 0, {})))


@dataclass
class HeldRequest:
    came_with: int
    tokens: int


class Model:
    """What one rank truly holds, and which of its ids nobody has published yet: a dict and a sum."""

    def __init__(self) -> None:
        self.held: dict[int, HeldRequest] = {}
        self.unpublished: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.held.values())


moves = st.fixed_dictionaries(
    {
        "burst": st.lists(st.integers(0, 1000), max_size=15),
        "generates": st.integers(0, 3),
        "finishes": st.floats(0, 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(st.lists(moves, min_size=3, max_size=3), max_size=12),
    every=st.integers(1, 4),
    ids_per_gather=st.integers(1, 5),
)
def test_what_is_published_and_what_is_in_flight_add_up_to_what_each_rank_holds(
    script: list[list[dict[str, Any]]], every: int, ids_per_gather: int
) -> None:
    engine = Engine([0, None, 1, None, 2], ids_per_gather, every)
    ranks = [Model(), Model(), Model()]
    published: list[int] = []
    next_id = 0
    drain = [[{"burst": [], "generates": 1, "finishes": 0.0}] * 3] * (15 * 12 + 1) * every
    for at, step in enumerate(script + drain):
        if at >= len(script) and not any(hook.waiting_ids for hook in engine.hooks) and at % every == 1 % every:
            break
        given_ = {}
        for index, (rank, move) in enumerate(zip(ranks, step, strict=True)):
            for request in rank.held.values():
                request.tokens += move["generates"]
            received = {}
            for tokens in move["burst"]:
                next_id += 1
                received[next_id] = rank.unpublished[next_id] = tokens
                if tokens:  # with 0 it was rejected: it has come, and it is not held
                    rank.held[next_id] = HeldRequest(tokens, tokens)
            for id_ in list(rank.held)[: int(move["finishes"] * len(rank.held))]:
                if id_ not in received:
                    del rank.held[id_]
            given_[index] = (rank.tokens, len(rank.held), received)
        reports_before = len(engine.outbox.reports)
        engine.step(given_)
        assert len(engine.outbox.reports) - reports_before == (at % every == 0)
        if at % every:
            continue
        _, counts, ids = engine.outbox.reports[-1]
        published += ids
        for rank, count in zip(ranks, counts, strict=True):
            for id_ in ids:
                rank.unpublished.pop(id_, None)
            in_flight_tokens = sum(rank.unpublished.values())
            in_flight_requests = sum(tokens > 0 for tokens in rank.unpublished.values())
            # Exact; but a rank that holds less than its waiting ids came with has nothing left to subtract from.
            assert count[0] + in_flight_tokens == max(rank.tokens, in_flight_tokens)
            assert count[1] + in_flight_requests == max(len(rank.held), in_flight_requests)
    assert sorted(published) == list(range(1, next_id + 1)), "every id travels, and once"


def test_only_leaders_count_when_several_processes_serve_a_rank() -> None:
    engine = Engine([0, None, 1, None])
    engine.step({0: (10, 1, {1: 10}), 1: (20, 2, {2: 20}), -1: (10, 1, {1: 10})})
    assert engine.outbox.reports == [(1, [(10, 1), (20, 2)], [1, 2])]
    assert engine.table.calls == [1, 1, 1, 1]


def test_ids_that_do_not_fit_travel_later_the_oldest_first() -> None:
    engine = Engine([0], ids_per_gather=2)
    engine.step({0: (60, 3, {7: 10, 8: 20, 9: 30})})
    engine.step({0: (64, 4, {5: 1})})
    assert engine.outbox.reports == [(1, [(30, 2)], [7, 8]), (2, [(64, 4)], [9, 5])]


def test_pending_tokens_and_kv_usage_travel_from_those_ranks_that_know_them() -> None:
    table, outbox = Table(3), Outbox()
    hooks = [StepHook(GatherForm(table.seat(at), at, 2, 4, outbox if at == 0 else None)) for at in (1, 0)]
    hooks.insert(0, StepHook(GatherForm(table.seat(2), None, 2, 4, None)))  # leads no rank
    hooks[0].after_step(0, 0, {})
    hooks[1].after_step(70, 2, {})
    hooks[2].after_step(60, 3, {1: 10}, 25, 0)
    hooks[0].after_step(0, 0, {})
    hooks[1].after_step(70, 2, {})
    hooks[2].after_step(60, 3, {})
    assert outbox.reports == [(1, [(60, 3, 25, 0), (70, 2, None, None)], [1]), (2, [(60, 3), (70, 2)], [])]


def test_a_prompt_whose_id_waits_is_pending_as_a_booking_and_nowhere_else() -> None:
    intake = Intake()
    intake.take_in(100, 2, {1: 40, 2: 30}, 70, 500)
    assert intake.share(1).counts == (70, 1, 40, 500), "2 waits, with 30 tokens"
    assert intake.share().counts == (100, 2, 70, 500)
    intake.take_in(100, 2, {}, "many", 2_000)
    assert intake.share().counts == (100, 2, 70, 500), "the last good ones"
    assert intake.trouble.counts == {"pending tokens": 1, "KV usage": 1}


def test_a_waiting_id_that_comes_again_is_one_booking() -> None:
    intake = Intake()
    intake.take_in(5, 1, {1: 5})
    intake.take_in(12, 2, {1: 7})
    share = intake.share(0)
    assert (share.counts, share.received) == ((7, 1), []), "Redis still counts the first one's 5"
    share = intake.share()
    assert (share.counts, share.received) == ((12, 2), [1])


def test_all_ranks_gather_at_the_same_steps() -> None:
    engine = Engine([0, 1], every=3)
    for _ in range(8):
        engine.step({})
    assert [step for step, _, _ in engine.outbox.reports] == [1, 4, 7]
    assert engine.table.calls == [3, 3]


def test_the_leader_form_passes_all_ids_on_at_once() -> None:
    outbox = Outbox()
    hook = StepHook(LeaderForm(outbox))
    hook.after_step(5_000, 5_000, dict.fromkeys(range(5000), 1))
    assert outbox.reports == [(1, [(5_000, 5_000)], list(range(5_000)))]
    hook.close()
    assert outbox.closed == 1


class Malicious:
    def __index__(self) -> int:
        raise RuntimeError("no number")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __repr__(self) -> str:
        raise RuntimeError("no words")


BAD_COUNTS = [-1, float("nan"), float("inf"), 0.5, 2**41, 10**5000, "7", None, Malicious(), [1]]


@pytest.mark.parametrize("bad", BAD_COUNTS, ids=lambda bad: type(bad).__name__)
def test_a_bad_count_leaves_the_last_good_one_and_enters_the_collective(
    bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine([0, 1])
    engine.step({0: (10, 1, {}), 1: (20, 2, {})})
    with caplog.at_level(logging.WARNING, "scheduler_hooks"):
        for _ in range(3):
            engine.step({0: (bad, bad, {}), 1: (21, 3, {})})
    assert engine.outbox.reports[-1] == (4, [(10, 1), (21, 3)], [])
    assert engine.table.calls == [4, 4]
    assert engine.hooks[0].troubles == {"holding tokens": 3, "requests": 3}
    assert len(caplog.records) == 2, "each kind of trouble is logged once"


@pytest.mark.parametrize(
    "bad", [None, [], 5, [1, 2], "ids", Malicious(), float("nan")], ids=lambda bad: type(bad).__name__
)
def test_bad_received_ids_never_raise(bad: Any) -> None:
    engine = Engine([0])
    engine.step({0: (1, 1, bad)})
    assert engine.outbox.reports == [(1, [(1, 1)], [])]


def test_one_bad_id_does_not_lose_the_good_ones() -> None:
    engine = Engine([0], ids_per_gather=9)
    bad_ids: dict[Any, Any] = {-1: 1, 2**63: 1, "x": 1, None: 1, 0.5: 1}
    engine.step({0: (30, 3, {1: 10, **bad_ids, 2**63 - 1: 20, 3: -5, 4: float("nan")})})
    assert engine.outbox.reports == [(1, [(30, 3)], [1, 2**63 - 1, 3, 4])]
    assert engine.hooks[0].troubles == {"received id": 5, "tokens of a received id": 2}


def test_whole_numbers_of_other_libraries_are_numbers() -> None:
    class Int64:
        def __index__(self) -> int:
            return 12

    engine = Engine([0])
    engine.step({0: (Int64(), 3.0, {})})
    assert engine.outbox.reports == [(1, [(12, 3)], [])]


def test_a_queue_without_end_is_cut_and_the_oldest_ids_are_left_to_their_lease() -> None:
    intake = Intake(most_waiting=3)
    intake.take_in(15, 5, {1: 1, 2: 2, 3: 3, 4: 4, 5: 5})
    assert intake.waiting == 3
    assert intake.trouble.counts == {"dropped id": 2}
    share = intake.share()
    assert (share.counts, share.received) == ((15, 5), [3, 4, 5])


def test_a_failed_collective_is_off_for_good_and_reports_end(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def gather(self, row: array[int]) -> memoryview | None:
            self.calls += 1
            raise RuntimeError("connection closed by peer")

    broken, outbox = Broken(), Outbox()
    hook = StepHook(GatherForm(broken, 0, 1, 4, outbox))
    for _ in range(5):
        hook.after_step(1, 1, {1: 1})
    assert broken.calls == 1
    assert outbox.silenced
    assert outbox.reports == []
    assert len(caplog.records) == 1
    hook.close()
    assert outbox.closed == 1


def test_a_rank_without_a_leader_is_not_reported_as_an_empty_one() -> None:
    outbox = Outbox()
    hook = StepHook(GatherForm(Table(1).seat(0), 0, 2, 4, outbox))
    hook.after_step(1, 1, {})
    assert outbox.reports == []
    assert hook.troubles == {"report": 1}


def test_an_outlet_that_raises_does_not_reach_the_engine() -> None:
    class Raising(Outbox):
        def hand_over(self, step: int, counts: Sequence[Counts], received: Sequence[int] = ()) -> None:
            raise RuntimeError("bug")

    hook = StepHook(LeaderForm(Raising()))
    hook.after_step(1, 1, {})
    hook.after_step(1, 1, {})
    assert hook.troubles == {"report": 2}


AGREED = [1, 2, 3, 256]  # all well, size, every, ids_per_gather


@pytest.mark.parametrize(
    ("plans", "says"),
    [
        ([[*AGREED, 0], [1, 2, 4, 256, 1]], "every must be the same"),
        ([[*AGREED, 0], [1, 3, 3, 256, 1]], "size must be the same"),
        ([[*AGREED, 0], [1, 2, 3, 128, 1]], "ids_per_gather must be the same"),
        ([[*AGREED, 0], [*AGREED, 0]], "exactly one leader"),
        ([[*AGREED, 0], [*AGREED, -1]], "exactly one leader"),
        ([[*AGREED, 0], [0, 0, 0, 0, 0]], "another process"),
    ],
    ids=["every", "size", "ids", "two leaders", "no leader", "wrong elsewhere"],
)
def test_processes_that_do_not_agree_are_an_error(plans: list[list[int]], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_plans(plans)


@pytest.mark.parametrize("every", [0, -1, 1.5, "3", 1_001])
def test_a_cadence_must_be_a_number_of_steps(every: Any) -> None:
    with pytest.raises(InvalidInput, match="every"):
        StepHook(LeaderForm(Outbox()), every)


@pytest.mark.parametrize(
    "wrong", [{"engine": "no name"}, {"index": -1}, {"capacity_tokens": 0}, {"every": 0}, {"heartbeat_s": 0}], ids=str
)
def test_a_wrong_argument_is_said_at_construction(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"engine": "e0", "index": 0} | wrong
    with pytest.raises(InvalidInput):
        StepHook.leading(Settings(url="redis://127.0.0.1:1/0"), **arguments)


def test_importing_the_hooks_does_not_import_torch() -> None:
    code = "import sys, scheduler_hooks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
