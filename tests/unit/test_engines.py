"""Engines come, fall silent, drain, leave, come back; what is said about them is never older than they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from balancer import Dispatcher, EngineState, Fenced, InvalidInput, RankCounts, Reporter, WrongSize
from balancer.admin import PoolAdmin
from balancer.keys import pool_keys
from balancer.model import Incarnation
from balancer.protocol import Operation
from balancer.protocol import join as join_operation
from tests.clock import Clock

Join = Callable[..., Reporter]
Run = Callable[[Operation[Incarnation]], Incarnation]


def states(admin: PoolAdmin) -> dict[str, EngineState]:
    return {rank.rank: rank.state for rank in admin.snapshot().ranks}


# -- joining


def test_an_engine_that_has_joined_is_idle_and_eligible(join: Join, admin: PoolAdmin, dispatcher: Dispatcher) -> None:
    join("e", 2, address="10.0.0.7:30000", capacity_tokens=1_000)
    (engine,) = admin.snapshot().engines
    assert (engine.name, engine.size, engine.step, engine.address) == ("e", 2, 0, "10.0.0.7:30000")
    assert states(admin) == {"e/0": EngineState.UP, "e/1": EngineState.UP}
    assert dispatcher.dispatch("a", 1).load_tokens == 0


def test_joining_again_with_the_same_nonce_changes_nothing(join: Join, admin: PoolAdmin, client: redis.Redis) -> None:
    engine = join("e", 2)
    engine.report(1, [RankCounts(5, 1), RankCounts(6, 1)])
    before, records = engine.incarnation.epoch, client.hgetall("dpb:{p}:engines")
    assert engine.join() == before
    assert client.hgetall("dpb:{p}:engines") == records
    assert [rank.holding_tokens for rank in admin.snapshot().ranks] == [5, 6]


def test_joining_again_with_the_same_nonce_and_another_size_is_refused(run: Run) -> None:
    run(join_operation("p", Incarnation("e", 2, "n1")))
    with pytest.raises(WrongSize, match="2 ranks and now reports 3"):
        run(join_operation("p", Incarnation("e", 3, "n1")))


def test_a_restarted_engine_begins_empty_and_may_have_another_size(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    join("e", 4, capacity_tokens=10).report(1, [RankCounts(5, 1)] * 4)
    dispatcher.dispatch("a", 5)
    join("e", 2)
    ranks = admin.snapshot().ranks
    assert [(rank.rank, rank.load_tokens, rank.capacity_tokens) for rank in ranks] == [
        ("e/0", 0, None),
        ("e/1", 0, None),
    ]


def test_what_was_in_flight_to_an_earlier_life_ends_without_touching_the_new_one(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    join("e", 1)
    dispatcher.dispatch("a", 5)
    join("e", 1)
    dispatcher.dispatch("b", 7)
    assert dispatcher.release("a") == 1
    (rank,) = admin.snapshot().ranks
    assert (rank.in_flight_tokens, rank.in_flight_requests) == (7, 1)


def test_a_request_booked_in_an_earlier_life_is_placed_anew(join: Join, dispatcher: Dispatcher) -> None:
    join("e", 1)
    dispatcher.dispatch("a", 5)
    join("e", 1)
    assert dispatcher.dispatch("a", 5).outcome == "placed"


def test_no_two_lives_have_one_epoch_though_the_clock_stands_still_or_goes_back(join: Join, clock: Clock) -> None:
    epochs = []
    for move in (0, 0, -60_000, 0, 120_000):
        clock.move(move)
        engine = join("e", 1)
        epochs.append(engine.incarnation.epoch)
        engine.leave()
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == clock.now_ms


def test_leaving_and_joining_within_a_millisecond_leaves_nothing_negative(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("e", 1).leave()
    first = join("e", 1)
    dispatcher.dispatch("a", 5)
    first.leave()
    join("e", 1)
    dispatcher.release("a")
    assert admin.snapshot().ranks[0].in_flight_tokens == 0


def test_an_engine_replaces_its_ranks_that_reported_alone_and_they_replace_it(join: Join, admin: PoolAdmin) -> None:
    for index in range(3):
        join("e", index=index)
    join("neighbour", 1)
    join("e", 2)
    assert set(states(admin)) == {"e/0", "e/1", "neighbour/0"}
    join("e", index=1)
    assert set(states(admin)) == {"e/1", "neighbour/0"}


# -- silence


def test_a_silent_engine_gets_nothing_until_it_reports_again(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    quiet, loud = join("quiet", 1), join("loud", 1)
    clock.move(4_000)
    loud.report(1, [RankCounts(100, 1)])
    assert dispatcher.dispatch("a", 1).rank == "quiet/0"
    clock.move(1_000)
    assert states(admin) == {"quiet/0": EngineState.SILENT, "loud/0": EngineState.UP}
    assert dispatcher.dispatch("b", 1).rank == "loud/0"
    quiet.report(1, [RankCounts(0, 0)])
    assert dispatcher.dispatch("c", 1).rank == "quiet/0"


def test_what_a_silent_engine_was_sent_counts_when_it_is_back(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    engine = join("e", 1)
    dispatcher.dispatch("a", 70)
    clock.move(5_000)
    join("other", 1)
    dispatcher.dispatch("b", 1)
    engine.report(1, [RankCounts(0, 0)])
    assert admin.snapshot().ranks[0].load_tokens == 70


def test_an_engine_silent_for_long_is_forgotten(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("gone", 2)
    admin.configure(forget_ms=60_000)
    clock.move(5_000)
    other = join("other", 1)
    dispatcher.dispatch("a", 1)
    clock.move(59_999)
    other.report(1, [RankCounts(0, 0)])
    assert set(states(admin)) == {"gone/0", "gone/1", "other/0"}
    clock.move(1)
    other.report(2, [RankCounts(0, 0)])
    assert set(states(admin)) == {"other/0"}


def test_every_key_of_an_abandoned_pool_ends_by_itself(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    admin.configure(forget_ms=10_000, booking_lease_ms=3_000, policy="envelope")
    join("e", 1)
    dispatcher.dispatch("a", 1)
    join("limited", 1, capacity_tokens=100).report(1, [RankCounts(0, 0, 0, 0)])
    for key in pool_keys("p")[1:]:
        assert 0 < client.pttl(key) <= 23_000, key


def test_a_report_prolongs_the_life_of_every_key(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    admin.configure(policy="envelope")
    engine = join("e", 1)
    dispatcher.dispatch("a", 1)
    join("limited", 1, capacity_tokens=100).report(1, [RankCounts(0, 0, 0, 0)])
    for key in pool_keys("p")[1:]:
        client.pexpire(key, 1_000_000)
    engine.report(1, [RankCounts(0, 0)])
    assert {client.pttl(key) > 7_000_000 for key in pool_keys("p")[1:]} == {True}


# -- draining


def test_a_draining_rank_gets_nothing_and_keeps_what_it_has(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    engine = join("e", 2)
    engine.report(1, [RankCounts(0, 0), RankCounts(500, 5)])
    dispatcher.dispatch("a", 10)
    assert admin.drain("e", 0) == 1
    assert admin.drain("e", 0) == 1, "repeating changes nothing"
    assert dispatcher.dispatch("b", 1).rank == "e/1"
    assert dispatcher.dispatch("a", 10).rank == "e/0", "a repeat keeps its rank"
    engine.report(2, [RankCounts(3, 1), RankCounts(500, 5)])
    assert states(admin) == {"e/0": EngineState.DRAINING, "e/1": EngineState.UP}
    assert admin.snapshot().ranks[0].load_tokens == 13
    assert admin.undrain("e", 0) == 2
    assert dispatcher.dispatch("c", 1).rank == "e/0"


def test_one_rank_of_a_drained_engine_can_be_taken_back(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    join("e", 12)
    assert admin.drain("e") == 0
    assert admin.undrain("e", 11) == 1
    assert dispatcher.dispatch("a", 1).rank == "e/11"
    assert admin.drain("e", 11) == 0
    assert {engine.state for engine in admin.snapshot().engines} == {EngineState.DRAINING}


def test_an_engine_whose_ranks_report_alone_drains_as_a_whole_or_rank_by_rank(join: Join, admin: PoolAdmin) -> None:
    for index in range(3):
        join("e", index=index)
    assert admin.drain("e", 1) == 2
    assert admin.drain("e") == 0
    assert admin.undrain("e", 2) == 1


def test_a_new_life_begins_undrained(join: Join, admin: PoolAdmin) -> None:
    join("e", 2)
    admin.drain("e")
    join("e", 2)
    assert set(states(admin).values()) == {EngineState.UP}


def test_a_silent_engine_can_be_drained_before_it_comes_back(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    engine = join("e", 1)
    clock.move(5_000)
    join("other", 1)
    dispatcher.dispatch("a", 1)
    assert admin.drain("e") == 1
    engine.report(1, [RankCounts(0, 0)])
    assert dispatcher.dispatch("b", 1).rank == "other/0"


@pytest.mark.parametrize(("engine", "index"), [("nobody", None), ("e", 2), ("nobody", 0), ("solo", 1)])
def test_draining_what_is_not_there_says_so(join: Join, admin: PoolAdmin, engine: str, index: int | None) -> None:
    join("e", 2)
    join("solo", index=0)
    with pytest.raises(InvalidInput, match="lists its ranks"):
        admin.drain(engine, index)


# -- leaving


def test_an_engine_that_leaves_takes_its_ranks_with_it(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    engine = join("e", 2, capacity_tokens=100)
    dispatcher.dispatch("a", 1)
    engine.leave()
    engine.leave()
    snapshot = admin.snapshot()
    assert (snapshot.engines, snapshot.ranks) == ((), ())
    assert dispatcher.release("a") == 1
    assert client.keys() == ["dpb:{p}:pool"]


def test_an_older_life_that_leaves_does_not_take_the_newer_one_with_it(join: Join, admin: PoolAdmin) -> None:
    older = join("e", 1)
    join("e", 1)
    with pytest.raises(Fenced):
        older.leave()
    assert states(admin) == {"e/0": EngineState.UP}


def test_one_rank_that_reports_alone_leaves_alone(join: Join, admin: PoolAdmin) -> None:
    first, _ = join("e", index=0), join("e", index=1)
    first.leave()
    assert set(states(admin)) == {"e/1"}
