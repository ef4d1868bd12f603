"""Real processes are killed with kill -9; the state is right again within one lease or one report, and we say when.

Every test prints one line with how long recovery took (`make chaos` shows them).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balancer import Dispatcher, NoRank, NoRankReason, PoolAdmin, PoolSnapshot, Settings
from balancer.embedded import EmbeddedRedis
from scheduler_hooks.mock_engine.client import MockEngineClient
from tests.cast import DispatcherProcess, MockEngineProcess, dispatchers

Eventually = Callable[..., None]

ENGINE_LEASE_MS = 1_500
BOOKING_LEASE_MS = 2_000
REPORT_MS = 1_000
"""Longest time between two reports of an idle engine: the hook's heartbeat."""
SLACK_MS = 1_500
"""What a machine of two crowded cores may add."""


@pytest.fixture(params=["with its data", "without its data"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where Redis keeps its data, or None where it keeps none."""
    return tmp_path / "redis" if request.param == "with its data" else None


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as started:
        yield started


def settings_for(server: EmbeddedRedis) -> Settings:
    return Settings(url=server.url, pool="p", budget_ms=500, probe_ms=100)


def configured(settings: Settings) -> PoolAdmin:
    admin = PoolAdmin(settings)
    admin.configure(engine_lease_ms=ENGINE_LEASE_MS, booking_lease_ms=BOOKING_LEASE_MS)
    return admin


def say(what: str, since_s: float) -> float:
    took_ms = (time.monotonic() - since_s) * 1e3
    print(f"\n    {what}: right again after {took_ms:,.0f} ms")
    return took_ms


def is_empty(snapshot: PoolSnapshot) -> bool:
    return not snapshot.bookings and not any(
        r.load_tokens or r.requests or r.in_flight_requests for r in snapshot.ranks
    )


def test_a_dispatcher_killed_between_dispatch_and_send_leaves_nothing_after_its_lease(
    server: EmbeddedRedis, eventually: Eventually
) -> None:
    settings = settings_for(server)
    admin = configured(settings)
    # Given a dispatcher that has dispatched, and sends nothing
    with MockEngineProcess(server.url, "p"), dispatchers(1, server.url, "p") as (dispatcher,):
        dispatcher.order([(f"never-sent-{number}", 1_000) for number in range(40)])
        dispatcher.answers()
        booked_s = time.monotonic()
        assert admin.snapshot().bookings == 40
        # When it is killed
        dispatcher.kill()
        # Then its bookings end with their lease, by the engine's next report, though nobody dispatches
        eventually(lambda: is_empty(admin.snapshot()), "the ranks are empty again")
        took_ms = say("bookings of a killed dispatcher", booked_s)
        assert BOOKING_LEASE_MS <= took_ms <= BOOKING_LEASE_MS + REPORT_MS + SLACK_MS
        assert admin.snapshot().expired == 40


def test_a_killed_engine_gets_no_more_requests_after_its_lease(server: EmbeddedRedis, eventually: Eventually) -> None:
    settings = settings_for(server)
    admin = configured(settings)
    with (
        MockEngineProcess(server.url, "p", name="left") as left,
        MockEngineProcess(server.url, "p", name="stays"),
        Dispatcher(settings) as dispatcher,
    ):
        eventually(lambda: len(admin.snapshot().ranks) == 8, "both engines have joined")
        left.kill()
        killed_s = time.monotonic()
        # Then, once its lease has ended, every request goes to the other engine
        number = iter(range(1_000_000))

        def only_the_other() -> bool:
            placed = [dispatcher.dispatch(f"r{next(number)}", 10) for _ in range(16)]
            dispatcher.release(*(placement.request.request_id for placement in placed))
            return {placement.engine for placement in placed} == {"stays"}

        eventually(only_the_other, "no request goes to the killed engine")
        took_ms = say("placement without a killed engine", killed_s)
        assert took_ms <= ENGINE_LEASE_MS + SLACK_MS


def test_an_engine_that_is_restarted_begins_a_new_epoch_with_empty_ranks(
    server: EmbeddedRedis, eventually: Eventually
) -> None:
    settings = settings_for(server)
    admin = configured(settings)
    with Dispatcher(settings) as dispatcher:
        with MockEngineProcess(server.url, "p") as first:
            for number in range(20):
                dispatcher.dispatch(f"lost-{number}", 500)
            epoch = admin.snapshot().engines[0].epoch
            first.kill()
        killed_s = time.monotonic()
        with MockEngineProcess(server.url, "p"):
            eventually(lambda: admin.snapshot().engines[0].epoch > epoch, "the new epoch has begun")
            say("a killed and restarted engine (its start included)", killed_s)
            # Then what was in flight to the dead one weighs on nobody
            assert {rank.load_tokens for rank in admin.snapshot().ranks} == {0}
            # and goes with its lease
            eventually(lambda: admin.snapshot().bookings == 0, "the old bookings are gone")
            assert all(rank.in_flight_tokens == 0 for rank in admin.snapshot().ranks)


def test_with_every_engine_dead_the_pool_says_all_silent(server: EmbeddedRedis, eventually: Eventually) -> None:
    settings = settings_for(server)
    configured(settings)
    with MockEngineProcess(server.url, "p") as engine, Dispatcher(settings) as dispatcher:
        dispatcher.dispatch("first", 10)
        engine.kill()

        numbers = iter(range(1_000_000))

        def reason() -> NoRankReason | None:
            try:
                dispatcher.dispatch(f"again-{next(numbers)}", 10)
            except NoRank as none:
                return none.reason
            return None

        eventually(lambda: reason() is NoRankReason.ALL_SILENT, "the pool says all_silent")


async def test_redis_killed_under_load_fails_no_request_and_is_exact_within_a_report(
    kept: Path | None, eventually: Eventually
) -> None:
    with EmbeddedRedis(directory=kept) as server:
        settings = settings_for(server)
        admin = configured(settings)
        with MockEngineProcess(server.url, "p", "--base-ms", "10") as engine, Dispatcher(settings) as dispatcher:
            async with await MockEngineClient.connect(engine.rank_ports) as client:
                # Given requests of 100 tokens that run for about 300 steps
                for number in range(40):
                    placement = dispatcher.dispatch(f"before-{number}", 100)
                    client.send(placement.index, f"before-{number}", 100, 300)
                await asyncio.to_thread(
                    eventually, lambda: sum(r.requests for r in admin.snapshot().ranks) == 40, "all are received"
                )

                # When Redis is killed while requests go on
                os.kill(server.pid, signal.SIGKILL)
                outcomes = []
                for number in range(40):
                    placement = dispatcher.dispatch(f"during-{number}", 100)
                    outcomes.append(placement.outcome.value)
                    client.send(placement.index, f"during-{number}", 100, 300)
                # Then each has been placed, by the last known loads
                assert outcomes == ["fallback"] * 40

                # When it is back
                server.stop()
                server.start()
                back_s = time.monotonic()
                if kept is None:
                    admin.configure(booking_lease_ms=BOOKING_LEASE_MS, engine_lease_ms=ENGINE_LEASE_MS)

                # Then one report later Redis holds what the engine holds, and nothing is in flight
                def is_exact() -> bool:
                    ranks = admin.snapshot().ranks
                    return len(ranks) == 4 and sum(r.requests + r.in_flight_requests for r in ranks) == 80

                await asyncio.to_thread(eventually, is_exact, "the counts are those of the engine")
                assert say("counts after Redis came back", back_s) <= REPORT_MS + SLACK_MS
                placement = await asyncio.to_thread(_placed_by_redis, dispatcher, eventually)
                client.send(placement.index, placement.request.request_id, 100, 300)

                # And at the end nothing is left
                finished = 0
                async for _, event in client.events():
                    finished += len(event.finished)
                    if finished == 81:
                        break
            await asyncio.to_thread(eventually, lambda: is_empty(admin.snapshot()), "the pool is empty")


def _placed_by_redis(dispatcher: Dispatcher, eventually: Eventually):  # type: ignore[no-untyped-def]
    """A placement by Redis, as soon as the dispatcher's breaker has closed again."""
    placements = []

    def closed() -> bool:
        if placements:
            dispatcher.release(placements[-1].request.request_id)
        placements.append(dispatcher.dispatch(f"after-{len(placements)}", 100))
        return placements[-1].outcome.value == "placed"

    eventually(closed, "requests are placed by Redis again")
    return placements[-1]


def test_a_dispatcher_whose_redis_is_paused_answers_within_its_budget(server: EmbeddedRedis) -> None:
    settings = settings_for(server)
    configured(settings)
    with MockEngineProcess(server.url, "p"):
        dispatcher = DispatcherProcess(server.url, "p", "d", budget_ms=200)
        try:
            dispatcher.wait_ready()
            dispatcher.order([("warm", 10)])
            dispatcher.answers()
            os.kill(server.pid, signal.SIGSTOP)
            asked_s = time.monotonic()
            dispatcher.order([(f"paused-{number}", 10) for number in range(200)])
            answers = dispatcher.answers()
            took_ms = (time.monotonic() - asked_s) * 1e3
        finally:
            os.kill(server.pid, signal.SIGCONT)
            dispatcher.end()
        assert {outcome for _, _, outcome in answers} == {"fallback"}
        # one budget for the first, none for the others but a probe's
        print(f"\n    200 requests with Redis paused, budget 200 ms: {took_ms:,.0f} ms in all")
        assert took_ms <= 2 * 200 + SLACK_MS
