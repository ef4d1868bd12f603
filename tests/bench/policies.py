"""Server time of a single dispatch under each policy, against minimum_tokens.

Each pool is in the state in which its own policy leaves it: generated chat, 64 requests for each rank, placed by the
policy and reported as held. What is measured are more requests of the same traffic.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from functools import partial

from balancer import RankCounts, Request, in_flight_id
from balancer.embedded import EmbeddedRedis
from balancer.policies import policies
from balancer.workload import generate
from tests.bench.measuring import Row, Target, in_turn, row
from tests.bench.pool import BenchPool

RANKS = (16, 64, 256)
REFERENCE = "minimum_tokens"
INDEXED = (REFERENCE, "envelope", "pending_envelope")
"""The policies that do not look at all ranks: the only ones measured at 256."""
TARGETS = {("envelope", 64): Target("at most", 1.5), ("pending_envelope", 64): Target("at most", 3)}
REQUESTS_PER_RANK = 64
AT_ONCE = 16
PER_ROUND = 128


def server_time(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """At 16, 64 and 256 ranks."""
    rows = []
    for ranks in RANKS:
        pools = {policy: settled(server, ranks, policy) for policy in (policies() if ranks < 256 else INDEXED)}
        source = random.Random(7)
        try:
            sides = [partial(_dispatch_us, pool, source) for pool in pools.values()]
            spent_us = dict(zip(pools, in_turn(5 if quick else 40, *sides), strict=True))
        finally:
            for pool in pools.values():
                pool.close()
        for policy in sorted(set(pools) - {REFERENCE}):
            what, target = f"dispatch, {policy}, {ranks} ranks", TARGETS.get((policy, ranks))
            rows.append(row(what, REFERENCE, spent_us[policy], spent_us[REFERENCE], target=target))
    return rows


def settled(server: EmbeddedRedis, ranks: int, policy: str) -> BenchPool:
    """A pool as its policy fills it; all is received, and half of each answer is there."""
    pool = BenchPool(server, ranks, policy, policy)
    tokens, requests = Counter[str](), Counter[str]()
    traffic = generate(ranks * REQUESTS_PER_RANK, 7, 1.0)
    for at in range(0, len(traffic), AT_ONCE):
        counts = [RankCounts(tokens[rank], requests[rank]) for rank in pool.incarnation.ranks]
        pool.run(pool.report([in_flight_id(str(number)) for number in range(at - AT_ONCE, at)], counts))
        timed = traffic[at : at + AT_ONCE]
        operation = pool.dispatch([Request(str(at + i), one.input_tokens) for i, one in enumerate(timed)])
        for one, placed in zip(timed, operation.read(pool.run(operation)).outcomes, strict=True):
            tokens[placed.rank] += one.input_tokens + one.output_tokens // 2
            requests[placed.rank] += 1
    return pool


def _dispatch_us(pool: BenchPool, source: random.Random) -> float:
    traffic = generate(PER_ROUND, source.randrange(10**6), 1.0)
    requests = [Request(str(uuid.uuid4()), one.input_tokens) for one in traffic]
    spent_us = pool.server_us([pool.command(pool.dispatch([request])) for request in requests])
    pool.release(requests)
    return spent_us
