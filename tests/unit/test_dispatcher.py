"""A dispatcher answers with or without Redis, says which, and behaves alike in its sync and its async form."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from balancer import (
    AsyncDispatcher,
    Dispatcher,
    InvalidInput,
    NewerSchema,
    NoRank,
    NoRankReason,
    Outcome,
    RankCounts,
    Reporter,
    Request,
    Settings,
    StoreDenied,
)
from balancer.admin import PoolAdmin
from balancer.breaker import Breaker
from balancer.embedded import EmbeddedRedis
from balancer.last_known import LastKnown
from balancer.model import Scope
from tests.either import Awaited

Eventually = Callable[..., None]
Make = Callable[..., Any]

PATIENT_MS, PROBE_MS = 2_000, 300
BUDGET_MS = 200
"""Of stories that take Redis away, each of which waits for it; the others ask how a request goes, not how fast."""
NEVER_MS = 60_000


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest, redis_server: EmbeddedRedis, client: redis.Redis) -> Iterator[Make]:
    """Make a dispatcher of either kind: `make(probe_ms=100)`."""
    made = []

    def dispatcher(url: str = redis_server.url, **more: Any) -> Any:
        settings = Settings(url=url, pool="p", **{"budget_ms": PATIENT_MS, "probe_ms": PROBE_MS, **more})
        made.append(Dispatcher(settings) if request.param == "sync" else Awaited(AsyncDispatcher(settings)))
        return made[-1]

    yield dispatcher
    for one in made:
        one.close()


@contextmanager
def frozen(server: EmbeddedRedis) -> Iterator[None]:
    """Redis is there and says nothing."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def report(settings: Settings, *holding_tokens: int) -> None:
    """An engine `e` whose ranks hold so much."""
    reporter = Reporter(settings, "e", len(holding_tokens))
    reporter.report(1, [RankCounts(tokens, 1) for tokens in holding_tokens])
    reporter.close()


# -- while Redis is away


def test_without_redis_a_request_goes_to_the_least_loaded_rank_as_far_as_known(
    make: Make, settings: Settings, redis_server: EmbeddedRedis
) -> None:
    report(settings, 500, 0, 300)
    dispatcher = make(budget_ms=BUDGET_MS, probe_ms=NEVER_MS)
    assert dispatcher.dispatch("a", 100).rank == "e/1"
    with frozen(redis_server):
        fallen_back = [dispatcher.dispatch(f"r{number}", 100) for number in range(5)]
    assert {placement.outcome for placement in fallen_back} == {Outcome.FALLBACK}
    assert [placement.load_tokens for placement in fallen_back] == [100, 200, 300, 300, 400]
    assert Counter(placement.rank for placement in fallen_back) == {"e/1": 3, "e/2": 2}
    assert dispatcher.is_falling_back


def test_an_outage_costs_one_budget_and_not_one_per_request(
    make: Make, settings: Settings, redis_server: EmbeddedRedis
) -> None:
    report(settings, 0, 0)
    dispatcher = make(budget_ms=BUDGET_MS, probe_ms=NEVER_MS)
    dispatcher.dispatch("a", 1)
    with frozen(redis_server):
        began = time.monotonic()
        for number in range(500):
            dispatcher.dispatch(f"r{number}", 1)
        dispatcher.release("a")
        assert time.monotonic() - began < 10 * BUDGET_MS / 1000  # a hundred seconds without the breaker
    assert dispatcher.counters.fallback == 500
    assert dispatcher.counters.outages == 1


def test_nothing_needs_repair_when_redis_is_back(
    make: Make, settings: Settings, redis_server: EmbeddedRedis, admin: PoolAdmin, eventually: Eventually
) -> None:
    report(settings, 0, 0)
    dispatcher = make(budget_ms=BUDGET_MS)
    dispatcher.dispatch("a", 1)
    with frozen(redis_server):
        dispatcher.dispatch("b", 1)
    eventually(lambda: dispatcher.dispatch("c", 1).outcome != "fallback", "Redis places again")
    assert not dispatcher.is_falling_back
    booked = admin.snapshot().bookings
    assert booked in (2, 3)  # b too, where Redis found its request in the socket when it woke
    assert sum(rank.in_flight_tokens for rank in admin.snapshot().ranks) == booked


def test_a_dispatcher_that_never_saw_a_rank_says_that_redis_is_unreachable(
    make: Make, redis_server: EmbeddedRedis
) -> None:
    dispatcher = make(budget_ms=BUDGET_MS)
    with frozen(redis_server):
        for _ in range(2):
            with pytest.raises(NoRank, match="has not yet seen any rank") as none:
                dispatcher.dispatch("a", 1)
            assert none.value.reason is NoRankReason.UNREACHABLE


def test_an_outage_and_its_end_are_each_said_once(
    make: Make,
    settings: Settings,
    redis_server: EmbeddedRedis,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    report(settings, 0)
    dispatcher = make(budget_ms=BUDGET_MS)
    with caplog.at_level(logging.INFO, "balancer"):
        dispatcher.dispatch("a", 1)
        with frozen(redis_server):
            for number in range(20):
                dispatcher.dispatch(f"r{number}", 1)
        eventually(lambda: dispatcher.dispatch("b", 1).outcome != "fallback", "Redis places again")
        dispatcher.dispatch("c", 1)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["WARNING", "INFO"]
    assert "pool=p falls back to the last known loads: no answer from Redis" in said[0][1]
    assert "pool=p is placed by Redis again" in said[1][1]


def test_a_release_without_redis_raises_nothing_and_leaves_the_end_to_the_lease(
    make: Make, settings: Settings, redis_server: EmbeddedRedis
) -> None:
    report(settings, 0)
    dispatcher = make(budget_ms=BUDGET_MS)
    dispatcher.dispatch("a", 1)
    with frozen(redis_server):
        assert dispatcher.release("a") == 0
    assert dispatcher.counters.released == 0


def test_a_wrong_password_is_denied_and_not_called_an_outage_however_often_asked(make: Make) -> None:
    with EmbeddedRedis() as server:
        with redis.Redis.from_url(server.url) as plain:
            plain.config_set("requirepass", "hunter2")
        dispatcher = make(url=server.url, password="hunter3", probe_ms=NEVER_MS)
        for _ in range(3):
            with pytest.raises(StoreDenied, match="check user, password and ACL"):
                dispatcher.dispatch("a", 1)


def test_a_redis_that_answers_is_not_away_even_if_it_refuses(
    make: Make, settings: Settings, redis_server: EmbeddedRedis, client: redis.Redis, eventually: Eventually
) -> None:
    report(settings, 0)
    dispatcher = make(budget_ms=BUDGET_MS)
    dispatcher.dispatch("a", 1)
    with frozen(redis_server):
        dispatcher.dispatch("b", 1)
    client.hset("dpb:{p}:pool", "schema", "2")

    def is_refused() -> bool:
        try:
            return dispatcher.dispatch("c", 1).outcome != "fallback"
        except NewerSchema:
            return True

    eventually(is_refused, "the probe meets the newer schema")
    assert not dispatcher.is_falling_back
    with pytest.raises(NewerSchema):
        dispatcher.release("a")


# -- the length of a send


def test_a_booking_is_released_where_the_send_fails_and_kept_where_it_does_not(
    make: Make, settings: Settings, admin: PoolAdmin
) -> None:
    report(settings, 0)
    dispatcher = make()
    with dispatcher.booking("sent", 10) as placement:
        assert placement.rank == "e/0"

    def send_in_vain(failure: type[BaseException]) -> None:
        assert admin.snapshot().ranks[0].in_flight_tokens == 17
        raise failure

    for failure in (ConnectionResetError, KeyboardInterrupt, asyncio.CancelledError):
        with pytest.raises(failure), dispatcher.booking("not sent", 7):
            send_in_vain(failure)
    assert admin.snapshot().ranks[0].in_flight_tokens == 10
    assert dispatcher.counters.released == 3


def test_a_failed_send_stays_the_error_though_redis_is_away(
    make: Make, settings: Settings, redis_server: EmbeddedRedis
) -> None:
    report(settings, 0)
    dispatcher = make(budget_ms=BUDGET_MS)
    with pytest.raises(ConnectionResetError), dispatcher.booking("a", 10), frozen(redis_server):
        raise ConnectionResetError


# -- what it counts and says


def test_the_counters_tell_which_way_requests_went(make: Make, settings: Settings) -> None:
    report(settings, 0)
    dispatcher = make()
    dispatcher.dispatch("a", 1)
    dispatcher.dispatch_many([Request("a", 1), Request("b", 1)])
    dispatcher.release("a", "unknown")
    counters = dispatcher.counters
    assert (counters.placed, counters.repeated, counters.released) == (2, 1, 1)
    assert (counters.fallback, counters.no_rank, counters.outages) == (0, 0, 0)


def test_each_decision_can_be_followed_at_debug_level(
    make: Make, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make()
    with caplog.at_level(logging.DEBUG, "balancer"):
        with pytest.raises(NoRank):
            dispatcher.dispatch("early", 5)
        report(settings, 3)
        dispatcher.dispatch("a", 5)
    assert "pool=p request=early tokens=5 -> no_rank reason=nobody_joined" in caplog.text
    assert "pool=p request=a tokens=5 -> placed rank=e/0 load=3" in caplog.text


def test_the_bookings_carry_the_dispatchers_name(make: Make, settings: Settings, client: redis.Redis) -> None:
    report(settings, 0)
    make(name="gateway-7").dispatch("req-1", 812)
    (record,) = client.hvals("dpb:{p}:bookings")
    assert record.startswith("e/0 812 ")
    assert record.endswith(" gateway-7 req-1")


# -- threads, processes, event loops


def test_threads_share_one_dispatcher(settings: Settings, admin: PoolAdmin) -> None:
    report(settings, 0, 0, 0, 0)
    with Dispatcher(settings) as dispatcher:

        def work(name: str) -> None:
            for number in range(50):
                dispatcher.dispatch(f"{name}-{number}", 10)

        threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    loads = [rank.in_flight_tokens for rank in admin.snapshot().ranks]
    assert loads == [1_000] * 4


def test_a_dispatcher_made_before_a_fork_serves_parent_and_child(settings: Settings, admin: PoolAdmin) -> None:
    report(settings, 0)
    with Dispatcher(settings) as dispatcher:
        dispatcher.dispatch("before", 1)
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                for number in range(50):
                    assert dispatcher.dispatch(f"child-{number}", 1).request.request_id == f"child-{number}"
                failed = 0
            finally:
                os._exit(failed)
        for number in range(50):
            assert dispatcher.dispatch(f"parent-{number}", 1).outcome is Outcome.PLACED
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert admin.snapshot().bookings == 101


async def test_cancelled_dispatches_leave_no_answer_behind_for_somebody_else(
    settings: Settings, admin: PoolAdmin
) -> None:
    report(settings, 0, 0, 0, 0)
    async with AsyncDispatcher(settings) as dispatcher:
        for number in range(300):
            task = asyncio.ensure_future(dispatcher.dispatch(f"cancelled-{number}", 1))
            for _ in range(number % 12):  # so many turns of the loop, then its client has gone
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        placed = {name: await dispatcher.dispatch(name, 1) for name in (f"kept-{number}" for number in range(100))}
        again = {name: await dispatcher.dispatch(name, 1) for name in placed}
    assert {placement.outcome for placement in placed.values()} == {Outcome.PLACED}
    assert {name: placement.rank for name, placement in again.items()} == {
        name: placement.rank for name, placement in placed.items()
    }
    snapshot = admin.snapshot()
    assert sum(rank.in_flight_tokens for rank in snapshot.ranks) == snapshot.bookings


async def test_many_tasks_share_one_dispatcher(settings: Settings, admin: PoolAdmin) -> None:
    report(settings, 0, 0, 0, 0)
    async with AsyncDispatcher(replace(settings, budget_ms=20_000)) as dispatcher:
        await asyncio.gather(*(dispatcher.dispatch(f"r{number}", 10) for number in range(200)))
    assert [rank.in_flight_tokens for rank in admin.snapshot().ranks] == [500] * 4


# -- its parts, on a clock of their own


class Ticks:
    """A clock in s that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_breaker_lets_one_call_through_per_probe() -> None:
    ticks = Ticks()
    breaker = Breaker(probe_ms=500, clock=ticks)
    assert breaker.admits()
    assert breaker.failed(), "the first failure opens it"
    assert not breaker.failed(), "and only the first"
    assert not breaker.admits()
    ticks.now_s = 0.5
    assert [breaker.admits(), breaker.admits()] == [True, False]
    assert breaker.succeeded()
    assert not breaker.succeeded()
    assert not breaker.is_open
    assert breaker.admits()


def test_a_breaker_may_wait_for_several_failures_in_a_row() -> None:
    breaker = Breaker(probe_ms=500, clock=Ticks(), opens_after=3)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert not breaker.succeeded(), "it was never open"
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    assert not breaker.admits()


def test_knowledge_is_asked_for_once_per_second() -> None:
    ticks = Ticks()
    known = LastKnown(refresh_ms=1_000, clock=ticks)
    known.learn({"e/0": 0})
    assert [known.wants_loads(), known.wants_loads()] == [True, False]
    ticks.now_s = 1.0
    assert known.wants_loads()


def test_a_dispatcher_that_knows_nothing_asks_until_it_does() -> None:
    known = LastKnown(clock=Ticks())
    assert [known.wants_loads(), known.wants_loads()] == [True, True]
    known.learn({})
    assert known.wants_loads(), "an empty pool taught it nothing"
    known.learn({"e/0": 0})
    assert not known.wants_loads()


def test_a_dispatcher_whose_first_dispatch_failed_can_fall_back_after_its_second(
    make: Make, settings: Settings, redis_server: EmbeddedRedis, eventually: Eventually
) -> None:
    report(settings, 0)
    dispatcher = make(budget_ms=BUDGET_MS, probe_ms=1)
    with frozen(redis_server), pytest.raises(NoRank):
        dispatcher.dispatch("a", 1)
    eventually(lambda: _places(dispatcher), "Redis places again")
    with frozen(redis_server):
        assert dispatcher.dispatch("c", 1).outcome is Outcome.FALLBACK


def _places(dispatcher: Any) -> bool:
    try:
        return dispatcher.dispatch("b", 1).outcome != "fallback"
    except NoRank:
        return False


def test_old_knowledge_is_only_good_for_taking_turns() -> None:
    ticks = Ticks()
    known = LastKnown(trust_ms=30_000, clock=ticks)
    assert known.choose(1) is None
    known.learn({"e/0": 0, "e/1": 10**6, "e/2": 10**6})
    assert {known.choose(1)[0] for _ in range(6)} == {"e/0"}  # type: ignore[index]
    ticks.now_s = 30.0
    assert Counter(known.choose(1)[0] for _ in range(6)) == {"e/0": 2, "e/1": 2, "e/2": 2}  # type: ignore[index]


def test_ties_spread_in_the_fallback_too() -> None:
    known = LastKnown(clock=Ticks())
    known.learn({f"e/{index}": 0 for index in range(4)})
    assert set(Counter(known.choose(5)[0] for _ in range(40)).values()) == {10}  # type: ignore[index]


def test_the_fallback_keeps_to_the_ranks_that_it_is_given() -> None:
    known = LastKnown(clock=Ticks())
    known.learn({"a/0": 5, "a/1": 4, "b/0": 0})
    assert known.choose(9, Scope(among=["a/0", "a/1"])) == ("a/1", 4)
    assert known.choose(9, Scope(avoid=["b/0"])) == ("a/0", 5)
    assert known.choose(9, Scope(among=["stranger/0"])) is None


def test_an_empty_pool_teaches_nothing() -> None:
    known = LastKnown(clock=Ticks())
    known.learn({"e/0": 5})
    known.learn({})
    assert known.choose(1) == ("e/0", 5)


# -- a dispatch that names the ranks


def test_a_dispatch_that_names_ranks_gets_one_of_them_with_redis_and_without(
    make: Make, settings: Settings, redis_server: EmbeddedRedis
) -> None:
    report(settings, 0, 0, 0, 0)
    dispatcher = make(budget_ms=BUDGET_MS, probe_ms=NEVER_MS)
    named = ["e/1", "e/3"]
    assert {dispatcher.dispatch(f"r{number}", 1, named).rank for number in range(6)} == set(named)
    with frozen(redis_server):
        assert {dispatcher.dispatch(f"s{number}", 1, named).rank for number in range(6)} == set(named)
    assert dispatcher.is_falling_back


def test_named_ranks_that_are_not_there_are_answered_with_the_reason(make: Make, join: Callable[..., Reporter]) -> None:
    join("e", 1)
    with pytest.raises(NoRank) as caught:
        make().dispatch("r", 1, ["stranger/0"])
    assert caught.value.reason is NoRankReason.NOBODY_JOINED


@pytest.mark.parametrize("named", ["e/0", ["e 0"], ["e"], [f"e/{index}" for index in range(1_025)]])
def test_ranks_that_are_none_are_refused(make: Make, named: Any) -> None:
    with pytest.raises(InvalidInput):
        make().dispatch("r", 1, named)


def test_a_dispatcher_told_to_try_once_tries_once(make: Make, settings: Settings, redis_server: EmbeddedRedis) -> None:
    report(settings, 0)
    dispatcher = make(tries=1, budget_ms=1_000, probe_ms=NEVER_MS)
    dispatcher.dispatch("a", 1)
    with frozen(redis_server):
        began = time.monotonic()
        assert dispatcher.dispatch("b", 1).outcome is Outcome.FALLBACK
        assert 0.9 <= time.monotonic() - began < 1.9  # a silent server costs the whole budget, and no second one
