"""Server time of a single dispatch (INFO commandstats) against a script that only writes the booking.

How it changes with 100,000 ids in flight, and where a dispatcher names the ranks among which to choose.
"""

from __future__ import annotations

from balancer.embedded import EmbeddedRedis
from balancer.model import Scope
from balancer.protocol import ANYWHERE
from tests.bench.measuring import Row, Target, in_turn, row
from tests.bench.pool import FIRST_ID, BenchPool, Command
from tests.bench.references import booking_only, no_op

TARGETS = {16: Target("at most", 2), 64: Target("at most", 4), 256: Target("at most", 12)}
PER_ROUND = 256


def by_ranks(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """Both policies at 16, 64 and 256 ranks; a no-op for scale."""
    rows = []
    for policy in ("minimum_tokens", "round_robin"):
        for ranks, target in TARGETS.items():
            pool, writes = BenchPool(server, ranks, policy=policy), BenchPool(server, ranks, "writes")
            try:
                sides = (
                    lambda pool=pool: _dispatch_us(pool),
                    lambda writes=writes: _booking_only_us(writes),
                    lambda writes=writes: writes.server_us([no_op(writes)] * PER_ROUND),
                )
                dispatch, booking, nothing = in_turn(10 if quick else 60, *sides)
            finally:
                pool.close()
                writes.close()
            what = f"dispatch, {policy}, {ranks} ranks"
            judged = target if policy == "minimum_tokens" else None
            rows.append(row(what, "booking-only script", dispatch, booking, target=judged))
            rows.append(row(what, "no-op EVALSHA", dispatch, nothing))
    return rows


def in_flight(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """16 ranks, with nothing in flight and with 100,000 ids."""
    empty, full = BenchPool(server, 16, "empty"), BenchPool(server, 16, "full")
    try:
        full.book(10_000 if quick else 100_000)
        with_ids, without = in_turn(10 if quick else 60, lambda: _dispatch_us(full), lambda: _dispatch_us(empty))
    finally:
        empty.close()
        full.close()
    ids = "10,000" if quick else "100,000"
    return [row(f"dispatch with {ids} ids in flight", "none in flight", with_ids, without, "%", Target("at most", 110))]


def among(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """A server's own dispatcher, which names its ranks: alone in its pool, and as one of eight."""
    rows = []
    for policy in ("envelope", "minimum_tokens"):
        for servers, ranks in ((1, 16), (1, 64), (8, 16), (8, 64)):
            pool = BenchPool(server, ranks, policy=policy, others=servers - 1)
            own = Scope(pool.incarnation.ranks)
            try:
                sides = (lambda pool=pool, own=own: _dispatch_us(pool, own), lambda pool=pool: _dispatch_us(pool))
                named, unnamed = in_turn(10 if quick else 60, *sides)
            finally:
                pool.close()
            what = f"dispatch among own ranks, {policy}, {servers} x {ranks} ranks"
            rows.append(row(what, "among all", named, unnamed))
    return rows


def _dispatch_us(pool: BenchPool, scope: Scope = ANYWHERE) -> float:
    requests = pool.requests(PER_ROUND)
    spent_us = pool.server_us([pool.command(pool.dispatch([request], scope)) for request in requests])
    pool.release(requests)
    return spent_us


def _booking_only_us(pool: BenchPool) -> float:
    like = [pool.command(pool.dispatch([request])) for request in pool.requests(PER_ROUND)]
    script = booking_only(pool, like[0])[:2]
    spent_us = pool.server_us([(*script, *command[2:]) for command in like])
    ids: Command = tuple(command[FIRST_ID] for command in like)
    pool.redis.hdel(pool.keys[8], *map(str, ids))
    pool.redis.zrem(pool.keys[9], *map(str, ids))
    return spent_us
