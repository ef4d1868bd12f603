"""Bookings from placement to end, over a real Redis: batches, clients that leave, releases that wait, leases kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import redis

from balancer import NoRank, Outcome, PoolAdmin, RankCounts, Reporter, Settings
from balancer.model import MAX_TOKENS, in_flight_id
from balancer.serve.bookings import Bookings
from tests.unit.serve_cast import until

Join = Callable[..., Reporter]


@pytest.fixture
async def bookings(settings: Settings) -> AsyncIterator[Bookings]:
    made = Bookings(settings)
    made.start()
    yield made
    await made.stop()


def booked(client: redis.Redis) -> int:
    return int(client.hlen("dpb:{p}:bookings"))


async def test_many_requests_at_once_are_placed_evenly_and_all_end(
    join: Join, bookings: Bookings, client: redis.Redis
) -> None:
    join("e", 4)
    placements = await asyncio.gather(*(bookings.place(f"r{number}", 10) for number in range(400)))
    assert {placement.outcome for placement in placements} == {Outcome.PLACED}
    assert set(client.hvals("dpb:{p}:in_flight")) == {"1000"}
    for placement in placements:
        bookings.end(placement.request.request_id)
    await until(lambda: booked(client) == 0, "all bookings have ended")
    assert set(client.hvals("dpb:{p}:in_flight")) == {"0"}


async def test_requests_of_one_moment_share_an_eval(join: Join, bookings: Bookings, client: redis.Redis) -> None:
    join("e", 2)
    await bookings.place("warm", 1)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    await asyncio.gather(*(bookings.place(f"r{number}", 1) for number in range(100)))
    evals = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert evals <= 5  # one for the hundred; the others are those of the room's own looks


async def test_a_client_that_leaves_while_its_request_is_placed_leaves_no_booking(
    join: Join, bookings: Bookings, client: redis.Redis
) -> None:
    join("e", 1)
    asked = [bookings.place(f"gone{number}", 10) for number in range(20)]
    await asyncio.sleep(0)  # the EVAL is on its way
    for answer in asked:
        answer.cancel()
    await until(lambda: bookings.dispatcher.counters.placed == 20, "they were placed all the same")
    await until(lambda: booked(client) == 0, "and released")


async def test_a_request_without_a_rank_hears_why(bookings: Bookings) -> None:
    with pytest.raises(NoRank, match="nobody_joined"):
        await bookings.place("a", 1)


async def test_those_that_name_their_ranks_are_placed_beside_the_others(join: Join, bookings: Bookings) -> None:
    join("e", 2)
    answers = await asyncio.gather(
        *(bookings.place(f"r{number}", 1, ("e/1",) if number % 2 else ()) for number in range(40))
    )
    assert {answer.rank for answer in answers[1::2]} == {"e/1"}


async def test_an_open_request_keeps_its_booking_and_its_tokens_grow(
    join: Join, settings: Settings, admin: PoolAdmin
) -> None:
    engine = join("e", 1)
    admin.configure(booking_lease_ms=4_000)
    bookings = Bookings(settings)
    bookings.start()
    try:
        await until(lambda: bookings.booking_lease_s == 4.0, "the pool's lease is known")
        opened = bookings.watch(await bookings.place("open", 10), is_counted=True)
        await bookings.place("forgotten", 7)
        assert opened is not None
        opened.tokens += 90

        def sums() -> tuple[int, int]:
            engine.report(1, [RankCounts(0, 0)])  # what has ended ends
            (rank,) = admin.snapshot().ranks
            return rank.in_flight_tokens, rank.in_flight_requests

        await until(lambda: sums() == (100, 1), "the one has grown, the other's lease has ended")
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 5:  # longer than the lease
            assert sums() == (100, 1)
            await asyncio.sleep(0.05)
        bookings.end("open")
        await until(lambda: sums() == (0, 0), "its end is its release")
    finally:
        await bookings.stop()


async def test_growth_is_told_at_once_where_it_is_much_and_with_the_lease_where_it_is_little(
    join: Join, bookings: Bookings, client: redis.Redis
) -> None:
    join("e", 2)

    def told(request_id: str) -> int:
        return int(str(client.hget("dpb:{p}:bookings", str(in_flight_id(request_id)))).split(" ")[1])

    short, long = [
        bookings.watch(await bookings.place(request_id, tokens), is_counted=True)
        for request_id, tokens in (("short", 10), ("long", 10_000))
    ]
    assert short
    assert long
    short.tokens, long.tokens = 60, 10_050
    await until(lambda: told("short") == 60, "five times the prompt are told", within_s=2)
    assert told("long") == 10_000, "a two hundredth more can wait"
    long.tokens = 12_000
    await until(lambda: told("long") == 12_000, "a fifth cannot", within_s=2)


async def test_growth_that_an_absent_redis_was_not_told_is_told_at_its_return(
    join: Join, settings: Settings, client: redis.Redis
) -> None:
    join("e", 1)
    bookings = Bookings(replace(settings, probe_ms=100))
    bookings.start()
    try:
        opened = bookings.watch(await bookings.place("open", 10), is_counted=True)
        assert opened
        client.execute_command("CLIENT", "PAUSE", "3000", "ALL")
        opened.tokens = 60
        await until(lambda: bookings.dispatcher.is_falling_back, "the renewal has failed")
        assert opened.known == 10
        field = str(in_flight_id("open"))
        await until(lambda: str(client.hget("dpb:{p}:bookings", field)).split(" ")[1] == "60", "it is told", within_s=5)
    finally:
        await bookings.stop()


async def test_a_booking_that_has_outgrown_the_most_tokens_keeps_no_other_from_being_renewed(
    join: Join, bookings: Bookings, admin: PoolAdmin
) -> None:
    join("e", 2)
    for request_id, tokens in (("huge", 2 * MAX_TOKENS), ("other", 300)):
        opened = bookings.watch(await bookings.place(request_id, 10), is_counted=True)
        assert opened is not None
        opened.tokens = tokens
    await until(
        lambda: {rank.load_tokens for rank in admin.snapshot().ranks} == {MAX_TOKENS, 300}, "both have been renewed"
    )


async def test_a_silent_engine_is_none_to_choose_from_unless_all_are_silent(
    join: Join, bookings: Bookings, admin: PoolAdmin
) -> None:
    engine, gone = join("e", 2), join("gone", 1)
    admin.configure(engine_lease_ms=1_000)
    everybody = {"e/0", "e/1", "gone/0"}
    gone.report(1, [RankCounts(0, 0)])

    async def see(ranks: set[str], reports: bool) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while bookings.ranks != ranks:
            assert asyncio.get_running_loop().time() < deadline, bookings.ranks
            if reports:
                engine.report(2, [RankCounts(0, 0)] * 2)
            await bookings.look()
            await asyncio.sleep(0.05)

    await see(everybody, reports=True)
    await see({"e/0", "e/1"}, reports=True)
    await see(everybody, reports=False)


async def test_an_end_that_waits_does_not_end_the_same_id_placed_again(
    join: Join, bookings: Bookings, client: redis.Redis
) -> None:
    join("e", 1)
    await bookings.place("same", 10)
    bookings.end("same", is_urgent=False)
    await bookings.place("same", 10)
    await asyncio.sleep(0.5)
    assert booked(client) == 1


async def test_releases_wait_out_an_absent_redis(join: Join, settings: Settings, client: redis.Redis) -> None:
    join("e", 1)
    bookings = Bookings(replace(settings, probe_ms=50))
    bookings.start()
    try:
        await bookings.place("a", 10)
        bookings.dispatcher._placing.breaker.failed()
        bookings.end("a")
        placement = await bookings.place("b", 10)
        assert placement.outcome is Outcome.FALLBACK
        assert bookings.watch(placement, is_counted=True) is None  # nothing was booked
        await until(lambda: booked(client) == 0, "it is released when Redis answers again")
    finally:
        await bookings.stop()


async def test_what_has_ended_is_released_before_the_end(join: Join, settings: Settings, client: redis.Redis) -> None:
    join("e", 1)
    bookings = Bookings(settings)
    bookings.start()
    await bookings.place("a", 10)
    bookings.end("a")
    await bookings.stop()
    assert booked(client) == 0
