"""Many dispatcher processes at once place as one would: the claim on which everything rests."""

from __future__ import annotations

import time

import pytest
import redis

from balancer import Dispatcher, PoolAdmin, Reporter, Settings
from tests.cast import dispatchers

RANKS = 16
TOKENS = 100


@pytest.mark.parametrize("count", [1, 4, 16])
def test_equal_requests_never_leave_the_ranks_more_than_one_request_apart(
    settings: Settings, client: redis.Redis, count: int
) -> None:
    # Given sixteen empty ranks that nobody reports for a while, and dispatchers that are ready to go
    PoolAdmin(settings).configure(engine_lease_ms=600_000, booking_lease_ms=600_000)
    Reporter(settings, "engine", RANKS).join()
    assert settings.url
    with dispatchers(count, settings.url, settings.pool) as crowd, Dispatcher(settings) as onlooker:
        # When they all dispatch at once
        each = 4_000 // count
        for index, dispatcher in enumerate(crowd):
            dispatcher.order([(f"{index}-{number}", TOKENS) for number in range(each)])

        # Then at no moment are two ranks more than one request apart
        looks, placed, deadline_s = 0, 0, time.monotonic() + 120
        while placed < each * count:
            assert time.monotonic() < deadline_s, f"{placed} of {each * count} requests were placed within 120 s"
            loads = [rank.load_tokens for rank in onlooker.snapshot().ranks]
            placed = sum(loads) // TOKENS
            assert max(loads) - min(loads) <= TOKENS
            looks += 1
        assert looks > 10

        # And everything that was placed is booked exactly once, on the rank that the dispatcher was told
        told = [answer for dispatcher in crowd for answer in dispatcher.answers()]
    assert len(told) == each * count
    assert {outcome for _, _, outcome in told} == {"placed"}
    booked = client.hgetall("dpb:{p}:bookings").values()
    told_ranks = {request_id: rank for request_id, rank, _ in told}
    assert {record.split(" ")[4]: record.split(" ")[0] for record in booked} == told_ranks
