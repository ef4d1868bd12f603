"""Redis memory per id in flight: used_memory before and after 100,000 dispatches with uuid4 request ids."""

from __future__ import annotations

from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import Row, Target
from tests.bench.pool import BenchPool


def per_id(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """Bookings and deadlines together, hash tables included."""
    pool = BenchPool(server, 16)
    count = 10_000 if quick else 100_000
    try:
        pool.book(1_000)  # the client's buffers and the first hash tables are there
        before = pool.redis.info("memory")["used_memory"]
        pool.book(count)
        after = pool.redis.info("memory")["used_memory"]
        records: dict[bytes, bytes] = pool.redis.hscan(pool.keys[8], count=100)[1]  # type: ignore[assignment]
        content = sum(len(id_) + len(record) for id_, record in records.items()) / len(records)
    finally:
        pool.close()
    bytes_per_id = (after - before) / count
    context = {"content_of_booking_bytes": content}
    return [
        Row(f"one of {count:,} ids in flight", "-", bytes_per_id, bytes_per_id, bytes_per_id, "bytes",
            Target("at most", 300), context)
    ]  # fmt: skip
