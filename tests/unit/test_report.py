"""What an engine reports replaces what it reported before, ends what it has received, and may be repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from balancer import Dispatcher, Fenced, Outcome, RankCounts, Reported, Reporter, Request, Settings
from balancer.admin import PoolAdmin
from balancer.model import in_flight_id
from tests.clock import Clock

Join = Callable[..., Reporter]


def load_of(admin: PoolAdmin, rank: str) -> tuple[int, int]:
    """Holding and in-flight tokens of a rank."""
    (view,) = [view for view in admin.snapshot().ranks if view.rank == rank]
    return view.holding_tokens, view.in_flight_tokens


def test_a_report_replaces_the_counts_of_every_rank(join: Join, admin: PoolAdmin) -> None:
    engine = join("e", 2)
    engine.report(1, [RankCounts(10, 1), RankCounts(20, 2)])
    assert engine.report(2, [RankCounts(5, 7), RankCounts(0, 0)]) is Reported.APPLIED
    assert [(rank.holding_tokens, rank.requests) for rank in admin.snapshot().ranks] == [(5, 7), (0, 0)]


def test_pressure_is_shown_where_an_engine_knows_it_and_goes_with_its_life(
    join: Join, admin: PoolAdmin, client: redis.Redis
) -> None:
    def seen() -> list[tuple[int | None, int | None]]:
        return [(rank.pending_tokens, rank.kv_permille) for rank in admin.snapshot().ranks]

    engine = join("e", 3)
    assert seen() == [(None, None)] * 3
    engine.report(1, [RankCounts(10, 1, 10, 0), RankCounts(20, 2), RankCounts(5, 1, kv_permille=431)])
    assert seen() == [(10, 0), (None, None), (None, 431)]
    assert client.hgetall("dpb:{p}:pressure") == {"e/0": "10 0", "e/2": "- 431"}
    engine.report(2, [RankCounts(10, 1, 0, 12), RankCounts(20, 2), RankCounts(5, 1)])
    assert seen() == [(0, 12), (None, None), (None, None)], "what is known no more is shown no more"
    join("e", 2)
    assert seen() == [(None, None)] * 2
    assert not client.exists("dpb:{p}:pressure")


def test_a_repeated_report_changes_nothing(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    engine = join("e", 1)
    dispatcher.dispatch_many([Request("a", 10), Request("b", 7)])
    received = [in_flight_id("a")]
    assert engine.report(1, [RankCounts(10, 1)], received) is Reported.APPLIED
    assert engine.report(1, [RankCounts(10, 1)], received) is Reported.REPEATED
    assert load_of(admin, "e/0") == (10, 7)


def test_a_report_overtaken_by_a_later_one_still_ends_what_it_received(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    engine = join("e", 1)
    dispatcher.dispatch_many([Request("a", 10), Request("b", 7)])
    engine.report(9, [RankCounts(17, 2)], [in_flight_id("b")])
    assert engine.report(8, [RankCounts(10, 1)], [in_flight_id("a")]) is Reported.LATE
    assert load_of(admin, "e/0") == (17, 0)


def test_ids_that_nobody_booked_are_passed_over(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    engine = join("e", 1)
    dispatcher.dispatch("a", 10)
    engine.report(1, [RankCounts(3, 1)], [in_flight_id("sent past the dispatcher"), 0, 2**63 - 1])
    assert load_of(admin, "e/0") == (3, 10)


def test_an_id_booked_on_one_engine_and_received_by_another_ends_where_it_was_booked(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    join("booked", 1)
    dispatcher.dispatch("a", 10)
    join("receives", 1).report(1, [RankCounts(10, 1)], [in_flight_id("a")])
    assert load_of(admin, "booked/0") == (0, 0)
    assert load_of(admin, "receives/0") == (10, 0)


def test_more_ids_than_one_command_takes_end_in_one_report(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    engine = join("e", 2)
    requests = [Request(f"r{number}", 1) for number in range(2_600)]
    dispatcher.dispatch_many(requests)
    engine.report(1, [RankCounts(1_300, 1_300)] * 2, [request.in_flight_id for request in requests])
    assert admin.snapshot().bookings == 0
    assert [rank.load_tokens for rank in admin.snapshot().ranks] == [1_300, 1_300]


def test_an_older_life_of_the_engine_is_fenced_and_ends_nothing(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    older, newer = join("e", 1), join("e", 1)
    dispatcher.dispatch("a", 10)
    with pytest.raises(Fenced, match="newer life"):
        older.report(1, [RankCounts(99, 9)], [in_flight_id("a")])
    assert load_of(admin, "e/0") == (0, 10)
    assert newer.report(1, [RankCounts(1, 1)]) is Reported.APPLIED


@pytest.mark.parametrize("older_index", [None, 0])
def test_an_older_life_in_the_other_form_is_fenced_too(join: Join, admin: PoolAdmin, older_index: int | None) -> None:
    older = join("e", 1, index=older_index)
    join("e", 1, index=0 if older_index is None else None)
    with pytest.raises(Fenced):
        older.report(1, [RankCounts(99, 9)])
    assert load_of(admin, "e/0") == (0, 0)


def test_ranks_that_report_alone_do_not_fence_each_other(join: Join, admin: PoolAdmin) -> None:
    ranks = [join("e", index=index) for index in range(3)]
    for rank in ranks:
        assert rank.report(1, [RankCounts(5, 1)]) is Reported.APPLIED
    assert [view.rank for view in admin.snapshot().ranks] == ["e/0", "e/1", "e/2"]


def test_an_emptied_redis_is_right_again_with_the_next_report(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    engine = join("e", 2, address="10.0.0.7:30000", capacity_tokens=500)
    client.flushall()
    assert engine.report(7, [RankCounts(10, 1), RankCounts(20, 1)]) is Reported.APPLIED
    snapshot = admin.snapshot()
    assert [(rank.load_tokens, rank.capacity_tokens) for rank in snapshot.ranks] == [(10, 500), (20, 500)]
    assert [(view.address, view.step) for view in snapshot.engines] == [("10.0.0.7:30000", 7)]
    assert dispatcher.dispatch("a", 1).rank == "e/0"


def test_a_pool_whose_settings_somebody_deleted_begins_anew_with_the_next_report(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    engine = join("e", 1)
    admin.configure(policy="round_robin")
    dispatcher.dispatch("a", 10)
    client.delete("dpb:{p}:pool")
    assert dispatcher.dispatch("b", 1).outcome is Outcome.FALLBACK  # Redis knows no pool, the dispatcher knew one
    assert engine.report(1, [RankCounts(10, 1)], [in_flight_id("a")]) is Reported.APPLIED
    assert dispatcher.dispatch("b", 1).load_tokens == 10
    assert admin.snapshot().settings.policy == "envelope"


def test_what_was_in_flight_to_a_forgotten_engine_does_not_count_when_it_comes_back(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    engine = join("e", 1)
    other = join("other", 1)
    admin.configure(booking_lease_ms=10_000_000, forget_ms=1_000)
    other.report(1, [RankCounts(10**6, 1)])
    dispatcher.dispatch("a", 10)
    clock.move(5_000)
    other.report(2, [RankCounts(10**6, 1)])
    clock.move(1_000)
    other.report(3, [RankCounts(10**6, 1)])
    assert [view.rank for view in admin.snapshot().ranks] == ["other/0"]
    engine.report(1, [RankCounts(3, 1)])
    assert load_of(admin, "e/0") == (3, 0)
    assert dispatcher.release("a") == 1
    assert load_of(admin, "e/0") == (3, 0)


def test_a_report_joins_first_where_its_engine_has_not(settings: Settings, admin: PoolAdmin) -> None:
    engine = Reporter(settings, "e", 1)
    try:
        assert engine.incarnation.epoch == 0
        assert engine.report(1, [RankCounts(5, 1)]) is Reported.APPLIED
        assert engine.incarnation.epoch > 0
    finally:
        engine.close()
    assert load_of(admin, "e/0") == (5, 0)
