"""Server time of a report: with 0, 100 and 1,000 acknowledgements; as ratio to a no-op and as share of a 20 ms step."""

from __future__ import annotations

from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import Row, in_turn, row
from tests.bench.pool import BenchPool
from tests.bench.references import no_op

STEP_US = 20_000
REPORTS_PER_ROUND = 4


def server_time(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """At 16, 64 and 256 ranks."""
    rows = []
    for ranks in (16, 64, 256):
        for acknowledged in (0, 100, 1_000):
            pool = BenchPool(server, ranks)
            sides = (
                lambda pool=pool, acknowledged=acknowledged: _report_us(pool, acknowledged),
                lambda pool=pool: pool.server_us([no_op(pool)] * 256),
            )
            try:
                report, nothing = in_turn(5 if quick else 20, *sides)
            finally:
                pool.close()
            what = f"report, {ranks} ranks, {acknowledged} acknowledged"
            rows.append(row(what, "no-op EVALSHA", report, nothing))
            rows.append(row(what, "one core, a report every 20 ms", report, [STEP_US] * len(report), "%"))
    return rows


def _report_us(pool: BenchPool, acknowledged: int) -> float:
    received = [
        [request.in_flight_id for request in (pool.book(acknowledged) if acknowledged else [])]
        for _ in range(REPORTS_PER_ROUND)
    ]
    return pool.server_us([pool.command(pool.report(ids)) for ids in received])
