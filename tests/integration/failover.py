"""What a failover does to bookings: how many that were confirmed are gone, and whether one is kept twice."""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from balancer import BalancerError, in_flight_id
from tests.integration.booker import Booker
from tests.integration.stack import Stack, wait_until

_AT_ONCE = 20
_TOKENS = 100


@dataclass(frozen=True)
class Bookings:
    """Bookings around a failover, by what their dispatcher was told."""

    confirmed: int
    by_fallback: int
    refused: int
    lost: int
    elsewhere: int
    without_redis_ms: float
    mistakes: list[str]

    def __str__(self) -> str:
        return (
            f"{self.confirmed:,} bookings confirmed by Redis, {self.lost} of them lost, {self.elsewhere} kept on "
            f"another rank than was said; {self.by_fallback:,} placed by fallback, {self.refused:,} given no rank; "
            f"{self.without_redis_ms:,.0f} ms without Redis"
        )


def bookings_through(stack: Stack, fault: AbstractContextManager[object], hold_s: float) -> Bookings:
    """Book without a pause while `fault` befalls the primary and `hold_s` longer; then look what is there, and end it.

    Each id asked again afterwards keeps its rank where the booking survived, so that no failover books one twice.
    """
    told: dict[str, tuple[str, str]] = {}
    booker = Booker(stack, stack.dispatchers[0])
    numbers = itertools.count()
    name = f"failover-{time.monotonic_ns():x}"
    longest_ms, away_s = 0.0, None

    def book() -> None:
        nonlocal longest_ms, away_s
        booker.order(book=[(f"{name}-{next(numbers)}", _TOKENS) for _ in range(_AT_ONCE)])
        answers = booker.placed()
        for request_id, rank, outcome in answers:
            told[request_id] = (rank, outcome)
        if not any(outcome == "placed" for _, _, outcome in answers):
            away_s = away_s or time.monotonic()
        elif away_s is not None:
            longest_ms, away_s = max(longest_ms, (time.monotonic() - away_s) * 1e3), None

    try:
        with stack.watch() as watch:
            for _ in range(20):
                book()
            with fault:
                until_s = time.monotonic() + hold_s
                while time.monotonic() < until_s or (away_s is not None and time.monotonic() < until_s + 20):
                    book()
            wait_until(lambda: watch.sees("report_is_fresh"), "the engine reports")
            kept = {int(id_): record.split(" ")[0] for id_, record in watch.look().keys["bookings"].items()}
            confirmed = {request_id: rank for request_id, (rank, how) in told.items() if how in ("placed", "repeated")}
            ranks = {request_id: kept.get(in_flight_id(request_id)) for request_id in confirmed}
            for start in range(0, len(told), 500):
                booker.order(release=list(told)[start : start + 500])
                booker.released()
            wait_until(lambda: watch.sees("is_empty"), "the pool is empty")
    except BalancerError as error:
        raise AssertionError(f"Redis is away: {error}") from error
    finally:
        booker.end()
    return Bookings(
        confirmed=len(confirmed),
        by_fallback=sum(how == "fallback" for _, how in told.values()),
        refused=len(told) - len(confirmed) - sum(how == "fallback" for _, how in told.values()),
        lost=sum(rank is None for rank in ranks.values()),
        elsewhere=sum(rank is not None and rank != confirmed[request_id] for request_id, rank in ranks.items()),
        without_redis_ms=longest_ms,
        mistakes=watch.mistakes,
    )
