"""Where a request goes: to the least loaded rank that may take it, seen alike by every dispatcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import redis

from balancer import Dispatcher, NoRank, NoRankReason, Outcome, Placement, RankCounts, Reporter, Request, Settings
from balancer.admin import PoolAdmin
from balancer.model import in_flight_id
from tests.clock import Clock

Join = Callable[..., Reporter]


def ranks_of(answers: list[Placement | NoRank]) -> list[str]:
    return [answer.rank for answer in answers if isinstance(answer, Placement)]


def reason_of(dispatcher: Dispatcher, tokens: int = 1) -> NoRankReason:
    with pytest.raises(NoRank) as none:
        dispatcher.dispatch("refused", tokens)
    return none.value.reason


# -- minimum tokens


def test_a_request_goes_to_the_least_loaded_rank(join: Join, dispatcher: Dispatcher) -> None:
    join("e", 3).report(1, [RankCounts(30, 1), RankCounts(10, 9), RankCounts(20, 1)])
    placement = dispatcher.dispatch("a", 5)
    assert (placement.rank, placement.load_tokens, placement.outcome) == ("e/1", 10, Outcome.PLACED)
    assert (placement.engine, placement.index, placement.stale) == ("e", 1, False)


def test_what_is_in_flight_counts_as_much_as_what_is_held(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    admin.configure(policy="minimum_tokens")
    join("e", 2).report(1, [RankCounts(0, 0), RankCounts(10, 1)])
    assert dispatcher.dispatch("a", 11).rank == "e/0"
    assert dispatcher.dispatch("b", 2).rank == "e/1"
    assert dispatcher.dispatch("c", 1).rank == "e/0"


def test_a_report_does_not_wipe_out_what_it_does_not_contain(join: Join, dispatcher: Dispatcher) -> None:
    engine = join("e", 2)
    first = dispatcher.dispatch("a", 100)
    engine.report(1, [RankCounts(0, 0), RankCounts(0, 0)])
    second = dispatcher.dispatch("b", 1)
    assert second.rank != first.rank


def test_an_acknowledged_request_counts_once(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    engine = join("e", 1)
    dispatcher.dispatch("a", 100)
    engine.report(1, [RankCounts(100, 1)], [in_flight_id("a")])
    (rank,) = admin.snapshot().ranks
    assert (rank.holding_tokens, rank.in_flight_tokens, rank.load_tokens) == (100, 0, 100)


@pytest.mark.usefixtures("clock")
def test_ties_spread_over_the_ranks_of_an_idle_pool(join: Join, dispatcher: Dispatcher) -> None:
    join("e", 8)
    chosen = Counter[str]()
    for number in range(800):
        chosen[dispatcher.dispatch(f"r{number}", 10).rank] += 1
        dispatcher.release(f"r{number}")
    assert len(chosen) == 8
    assert max(chosen.values()) < 2 * min(chosen.values())  # 100 each; by chance not beyond 70 to 130


def test_dispatchers_that_take_turns_fill_the_ranks_evenly(join: Join, settings: Settings) -> None:
    join("e", 4)
    with Dispatcher(settings) as one, Dispatcher(settings) as other:
        chosen = Counter(
            dispatcher.dispatch(f"{i}{dispatcher}", 7).rank for i in range(20) for dispatcher in (one, other)
        )
    assert set(chosen.values()) == {10}


def test_a_list_is_placed_as_its_requests_would_be_one_after_the_other(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    admin.configure(policy="minimum_tokens")
    join("e", 3).report(1, [RankCounts(0, 0), RankCounts(5, 1), RankCounts(100, 1)])
    answers = dispatcher.dispatch_many([Request("a", 10), Request("b", 10), Request("c", 10), Request("d", 1)])
    assert ranks_of(answers) == ["e/0", "e/1", "e/0", "e/1"]
    assert [answer.load_tokens for answer in answers if isinstance(answer, Placement)] == [0, 5, 10, 15]


def test_a_list_longer_than_one_script_takes_is_placed_whole(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    join("e", 4)
    answers = dispatcher.dispatch_many(Request(f"r{number}", 1) for number in range(1_000))
    assert set(Counter(ranks_of(answers)).values()) == {250}
    assert admin.snapshot().bookings == 1_000
    assert dispatcher.release(*(f"r{number}" for number in range(1_000))) == 1_000
    assert dispatcher.dispatch_many([]) == []


# -- repeats


def test_a_repeat_returns_the_first_placement_whoever_asks(join: Join, settings: Settings, admin: PoolAdmin) -> None:
    join("e", 4)
    with Dispatcher(settings) as one, Dispatcher(settings) as other:
        first = one.dispatch("a", 10)
        again = other.dispatch("a", 10)
    assert (again.rank, again.outcome) == (first.rank, Outcome.REPEATED)
    assert sum(rank.in_flight_tokens for rank in admin.snapshot().ranks) == 10


def test_an_id_twice_in_one_list_is_placed_once(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    join("e", 4)
    first, second = dispatcher.dispatch_many([Request("a", 10), Request("a", 10)])
    assert isinstance(first, Placement)
    assert isinstance(second, Placement)
    assert (first.rank, second.outcome) == (second.rank, Outcome.REPEATED)
    assert admin.snapshot().bookings == 1


def test_an_id_named_twice_in_a_release_is_taken_off_once(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    join("e", 1)
    dispatcher.dispatch_many([Request("a", 10), Request("b", 1)])
    assert dispatcher.release("a", "a", "never dispatched") == 1
    assert dispatcher.release("a") == 0
    assert admin.snapshot().ranks[0].in_flight_tokens == 1


def test_an_id_acknowledged_twice_in_a_report_is_taken_off_once(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    engine = join("e", 1)
    dispatcher.dispatch_many([Request("a", 10), Request("b", 1)])
    engine.report(1, [RankCounts(10, 1)], [in_flight_id("a")] * 2)
    assert admin.snapshot().ranks[0].in_flight_tokens == 1


def test_a_released_request_may_be_dispatched_anew(join: Join, dispatcher: Dispatcher) -> None:
    join("e", 1)
    dispatcher.dispatch("a", 10)
    assert dispatcher.release("a") == 1
    assert dispatcher.dispatch("a", 10).outcome is Outcome.PLACED


def test_a_booking_ends_with_its_lease_unless_it_is_repeated(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    engine = join("e", 1)
    admin.configure(booking_lease_ms=10_000, engine_lease_ms=60_000)
    dispatcher.dispatch_many([Request("a", 10), Request("b", 1)])
    clock.move(9_999)
    dispatcher.dispatch("b", 1)
    clock.move(1)
    engine.report(1, [RankCounts(0, 0)])
    snapshot = admin.snapshot()
    assert (snapshot.ranks[0].in_flight_tokens, snapshot.bookings, snapshot.expired) == (1, 1, 1)


def test_a_dispatch_ends_more_old_bookings_than_it_makes(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("e", 1)
    admin.configure(booking_lease_ms=1_000)
    dispatcher.dispatch_many(Request(f"r{number}", 1) for number in range(100))
    clock.move(1_000)
    for number in range(6):
        dispatcher.dispatch(f"new{number}", 1)
    assert admin.snapshot().bookings == 6


@pytest.mark.parametrize("who", ["dispatcher", "engine"])
def test_a_lease_given_while_the_clock_was_back_ends_on_time(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock, who: str
) -> None:
    engine = join("e", 2)
    admin.configure(engine_lease_ms=60_000, booking_lease_ms=1_100)
    engine.report(1, [RankCounts(0, 0), RankCounts(10_000, 1)])
    dispatcher.dispatch("loads are learned", 1)
    dispatcher.dispatch("a", 1)
    clock.move(-2_000)
    if who == "engine":
        admin.configure(engine_lease_ms=1_100)
        clock.move(2_000)
        dispatcher.dispatch("b", 1)
        clock.move(-2_000)
        engine.report(2, [RankCounts(0, 0), RankCounts(10_000, 1)])
        clock.move(2_000)
        assert reason_of(dispatcher) is NoRankReason.ALL_SILENT
    else:
        dispatcher.dispatch("b", 1_000)
        clock.move(2_000)
        assert dispatcher.dispatch("c", 1).load_tokens == 2, "b has ended"


# -- capacity


def test_a_full_rank_is_passed_over_while_another_has_room(join: Join, dispatcher: Dispatcher) -> None:
    join("small", 1, capacity_tokens=50)
    join("large", 1, capacity_tokens=1_000).report(1, [RankCounts(500, 5)])
    assert dispatcher.dispatch("a", 51).rank == "large/0"
    assert dispatcher.dispatch("b", 50).rank == "small/0"
    assert dispatcher.dispatch("c", 1).rank == "large/0"


def test_a_rank_without_a_known_limit_has_room(join: Join, dispatcher: Dispatcher) -> None:
    join("small", 1, capacity_tokens=50)
    join("open", 1).report(1, [RankCounts(10**9, 5)])
    assert dispatcher.dispatch("a", 51).rank == "open/0"


def test_a_request_that_fits_nowhere_is_refused_while_the_others_of_its_list_are_placed(
    join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 2, capacity_tokens=100)
    answers = dispatcher.dispatch_many([Request("a", 60), Request("b", 101), Request("c", 60), Request("d", 60)])
    assert len(ranks_of(answers)) == 2
    refused = [answer.reason for answer in answers if isinstance(answer, NoRank)]
    assert refused == [NoRankReason.ALL_FULL] * 2


def test_a_pool_may_be_told_to_overfill_the_least_loaded_rank(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    join("e", 2, capacity_tokens=100).report(1, [RankCounts(100, 1), RankCounts(90, 1)])
    assert reason_of(dispatcher, tokens=20) is NoRankReason.ALL_FULL
    admin.configure(when_full="least_loaded")
    assert dispatcher.dispatch("a", 20).rank == "e/1"


# -- nobody to give


def test_no_rank_says_that_nobody_joined_and_writes_nothing(dispatcher: Dispatcher, client: redis.Redis) -> None:
    assert reason_of(dispatcher) is NoRankReason.NOBODY_JOINED
    assert client.keys() == []


def test_no_rank_says_that_all_are_silent(join: Join, dispatcher: Dispatcher, clock: Clock) -> None:
    join("e", 2)
    clock.move(5_000)
    assert reason_of(dispatcher) is NoRankReason.ALL_SILENT


def test_no_rank_says_that_all_are_draining(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    join("e", 2)
    assert admin.drain("e") == 0
    assert reason_of(dispatcher) is NoRankReason.ALL_DRAINING


def test_a_refused_request_is_not_booked(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    join("e", 2)
    admin.drain("e")
    reason_of(dispatcher)
    admin.undrain("e")
    assert dispatcher.dispatch("refused", 1).outcome is Outcome.PLACED
    assert dispatcher.counters.no_rank == 1


def test_a_pool_may_be_told_to_use_its_last_known_ranks_and_says_so(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("e", 2).report(1, [RankCounts(0, 0), RankCounts(10, 1)])
    admin.configure(when_silent="last_known")
    clock.move(5_000)
    placement = dispatcher.dispatch("a", 5)
    assert (placement.rank, placement.stale) == ("e/0", True)
    clock.move(10_000_000)
    assert dispatcher.dispatch("b", 50).stale


def test_the_last_known_ranks_are_all_of_them_not_the_last_to_fall_silent(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    admin.configure(when_silent="last_known")
    early = join("early", 1)
    early.report(1, [RankCounts(0, 0)])
    clock.move(1)
    join("late", 1).report(1, [RankCounts(10, 1)])
    clock.move(4_999)
    assert dispatcher.dispatch("a", 1).rank == "late/0", "early is silent, late is not yet"
    clock.move(1)
    placement = dispatcher.dispatch("b", 1)
    assert (placement.rank, placement.stale) == ("early/0", True)


def test_each_placement_on_a_last_known_rank_says_so(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    admin.configure(when_silent="last_known")
    join("gone", 1)
    clock.move(4_000)
    join("fresh", 1)
    dispatcher.dispatch("a", 1)
    clock.move(1_000)
    assert dispatcher.dispatch("b", 1).rank == "fresh/0"
    admin.drain("fresh")
    placements = [dispatcher.dispatch(f"r{number}", 1) for number in range(3)]
    assert [(placement.rank, placement.stale) for placement in placements] == [("gone/0", True)] * 3


def test_a_dead_rank_that_drains_is_silent_whatever_the_pool_does_with_the_silent(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("e", 2)
    admin.drain("e")
    assert reason_of(dispatcher) is NoRankReason.ALL_DRAINING
    clock.move(5_000)
    for when_silent in ("last_known", "refuse"):
        admin.configure(when_silent=when_silent)
        assert [reason_of(dispatcher) for _ in range(2)] == [NoRankReason.ALL_SILENT] * 2


def test_one_fresh_rank_is_preferred_to_all_that_are_silent(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    admin.configure(when_silent="last_known")
    back, _ = join("back", 1), join("gone", 1)
    clock.move(5_000)
    assert dispatcher.dispatch("a", 1).stale
    back.report(1, [RankCounts(10**6, 1)])
    placement = dispatcher.dispatch("b", 1)
    assert (placement.rank, placement.stale) == ("back/0", False)


def test_a_pool_can_be_told_so_when_all_have_already_fallen_silent(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    join("e", 1)
    clock.move(5_000)
    assert reason_of(dispatcher) is NoRankReason.ALL_SILENT
    admin.configure(when_silent="last_known")
    assert dispatcher.dispatch("a", 1).stale
    admin.configure(when_silent="refuse")
    assert reason_of(dispatcher) is NoRankReason.ALL_SILENT


# -- renewing


def test_a_renewed_booking_lives_on_and_counts_with_what_it_has_become(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    admin.configure(booking_lease_ms=10_000, engine_lease_ms=3_600_000)
    join("e", 1)
    dispatcher.dispatch_many([Request("long", 100), Request("other", 7)])
    for generated in (10, 20, 30):
        clock.move(8_000)
        assert dispatcher.renew(("long", 100 + generated), ("unknown", 1)) == 1
    dispatcher.dispatch("now", 1)
    (rank,) = admin.snapshot().ranks
    assert (rank.in_flight_tokens, rank.in_flight_requests, rank.load_tokens) == (131, 2, 131)
    assert dispatcher.release("long") == 1
    assert dispatcher.renew(("long", 500)) == 0
    assert admin.snapshot().ranks[0].load_tokens == 1


# -- round robin


def test_round_robin_gives_each_rank_its_turn_whatever_it_holds(
    join: Join, settings: Settings, admin: PoolAdmin
) -> None:
    admin.configure(policy="round_robin")
    join("e", 3).report(1, [RankCounts(10**6, 99), RankCounts(0, 0), RankCounts(5, 1)])
    with Dispatcher(settings) as one, Dispatcher(settings) as other:
        singles = [(one, other)[number % 2].dispatch(f"r{number}", 9).rank for number in range(6)]
        listed = ranks_of(one.dispatch_many(Request(f"list{i}", 9) for i in range(30)))
    assert set(Counter(singles).values()) == {2}, "the turn is shared"
    assert set(Counter(listed).values()) == {10}


def test_round_robin_passes_over_a_full_rank(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    admin.configure(policy="round_robin")
    join("e", 3, capacity_tokens=100).report(1, [RankCounts(100, 1), RankCounts(0, 0), RankCounts(50, 1)])
    assert "e/0" not in {dispatcher.dispatch(f"r{i}", 1).rank for i in range(12)}


def test_a_policy_changed_at_run_time_is_followed_by_all(join: Join, settings: Settings, admin: PoolAdmin) -> None:
    join("e", 2).report(1, [RankCounts(0, 0), RankCounts(10**6, 1)])
    with Dispatcher(settings) as one, Dispatcher(settings) as other:
        assert [one.dispatch("a", 1).rank, other.dispatch("b", 1).rank] == ["e/0", "e/0"]
        admin.configure(policy="round_robin")
        assert {one.dispatch("c", 1).rank, other.dispatch("d", 1).rank} == {"e/0", "e/1"}
        admin.configure(policy="minimum_tokens")
        assert [one.dispatch("e", 1).rank, other.dispatch("f", 1).rank] == ["e/0", "e/0"]
