"""What serve asks of the scripts: an open request's booking is renewed, a rank that cannot be reached is avoided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from balancer import (
    Dispatcher,
    InvalidInput,
    NoRank,
    Outcome,
    Placement,
    RankCounts,
    Reporter,
    Request,
    Settings,
    protocol,
)
from balancer.admin import PoolAdmin
from balancer.model import in_flight_id
from tests.clock import Clock

Join = Callable[..., Reporter]
Run = Callable[[protocol.Operation[Any]], Any]


def test_a_renewed_booking_outlives_its_lease_and_another_does_not(
    clock: Clock, join: Join, dispatcher: Dispatcher, admin: PoolAdmin, run: Run
) -> None:
    engine = join("e", 1)
    admin.configure(booking_lease_ms=1_000)
    dispatcher.dispatch("open", 10)
    dispatcher.dispatch("lost", 5)
    clock.move(900)
    assert run(protocol.renew("p", [("open", 0)])) == 1
    clock.move(900)
    engine.report(1, [RankCounts(0, 0)])
    (rank,) = admin.snapshot().ranks
    assert (rank.in_flight_tokens, rank.in_flight_requests) == (10, 1)


def test_a_renewal_makes_the_load_what_the_request_holds_by_now(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, run: Run, client: redis.Redis
) -> None:
    join("e", 2)
    dispatcher.dispatch("a", 10)
    dispatcher.dispatch("b", 11)
    for _ in range(2):  # repeated without harm
        assert run(protocol.renew("p", [("a", 300), ("b", 0)])) == 2
    loads = {rank.load_tokens: rank.in_flight_requests for rank in admin.snapshot().ranks}
    assert loads == {300: 1, 11: 1}
    assert sorted(score for _, score in client.zrange("dpb:{p}:loads", 0, -1, withscores=True)) == [11, 300]
    assert client.hget("dpb:{p}:bookings", str(in_flight_id("a"))).split(" ")[1] == "300"
    dispatcher.release("a")
    assert sum(rank.load_tokens for rank in admin.snapshot().ranks) == 11


def test_a_renewal_never_books(join: Join, dispatcher: Dispatcher, admin: PoolAdmin, run: Run) -> None:
    engine = join("e", 1)
    dispatcher.dispatch("a", 10)
    engine.report(1, [RankCounts(10, 1)], [in_flight_id("a")])  # acknowledged: its engine counts it
    assert run(protocol.renew("p", [("a", 20), ("never seen", 5)])) == 0
    assert admin.snapshot().bookings == 0


def test_a_booking_of_an_earlier_life_is_not_renewed(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, run: Run
) -> None:
    join("e", 1)
    dispatcher.dispatch("a", 10)
    join("e", 1)
    assert run(protocol.renew("p", [("a", 500)])) == 0
    assert admin.snapshot().ranks[0].load_tokens == 0


def test_an_id_named_twice_counts_once(join: Join, dispatcher: Dispatcher, admin: PoolAdmin, run: Run) -> None:
    join("e", 1)
    dispatcher.dispatch("a", 10)
    assert run(protocol.renew("p", [("a", 20), ("a", 20)])) == 1
    assert admin.snapshot().ranks[0].load_tokens == 20


def test_a_pool_that_nobody_opened_renews_nothing(run: Run, client: redis.Redis) -> None:
    assert run(protocol.renew("p", [("a", 1)])) == 0
    assert not client.keys("*")


def test_a_renewal_has_an_end() -> None:
    with pytest.raises(InvalidInput):
        protocol.renew("p", [])
    with pytest.raises(InvalidInput):
        protocol.renew("p", [("a", 1)] * 501)


# -- ranks to avoid


def placed(answers: list[Placement | NoRank]) -> list[str]:
    return [answer.rank if isinstance(answer, Placement) else answer.reason.value for answer in answers]


def test_a_rank_to_avoid_is_not_chosen_and_stays_eligible_for_others(join: Join, dispatcher: Dispatcher) -> None:
    join("e", 3).report(1, [RankCounts(0, 0), RankCounts(50, 1), RankCounts(100, 1)])
    assert placed(dispatcher.dispatch_many([Request("a", 1)], avoid=["e/0", "stranger/7"])) == ["e/1"]
    assert dispatcher.dispatch("b", 1).rank == "e/0"


def test_with_every_rank_avoided_there_is_none_and_no_key_loses_its_end(
    join: Join, dispatcher: Dispatcher, client: redis.Redis
) -> None:
    join("e", 2)
    assert placed(dispatcher.dispatch_many([Request("a", 1)], avoid=["e/0", "e/1"])) == ["all_draining"]
    assert client.pttl("dpb:{p}:loads") > 0
    assert dispatcher.dispatch("a", 1).outcome is Outcome.PLACED


def test_a_request_that_is_booked_keeps_its_rank_even_if_it_is_to_be_avoided(
    join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 2)
    first = dispatcher.dispatch("a", 1)
    (again,) = dispatcher.dispatch_many([Request("a", 1)], avoid=[first.rank])
    assert isinstance(again, Placement)
    assert (again.rank, again.outcome) == (first.rank, Outcome.REPEATED)


def test_the_fallback_avoids_them_too(join: Join, settings: Settings) -> None:
    join("e", 2)
    with Dispatcher(settings) as dispatcher:
        dispatcher.snapshot()
        dispatcher._placing.breaker.failed()
        answers = dispatcher.dispatch_many([Request(f"r{number}", 1) for number in range(4)], avoid=["e/1"])
    assert placed(answers) == ["e/0"] * 4


def test_a_snapshot_is_enough_to_fall_back_on(join: Join, settings: Settings) -> None:
    join("e", 2).report(1, [RankCounts(100, 1), RankCounts(0, 0)])
    with Dispatcher(settings) as dispatcher:
        dispatcher.snapshot()
        dispatcher._placing.breaker.failed()
        placement = dispatcher.dispatch("a", 1)
    assert (placement.rank, placement.outcome) == ("e/1", Outcome.FALLBACK)
