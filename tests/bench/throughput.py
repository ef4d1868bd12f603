"""Throughput from 32 connections, driven by redis-benchmark, so that no Python client is measured.

Every command has its own random id. The set in flight grows to REQUESTS within a measurement and is emptied after it.
"""

from __future__ import annotations

import csv
import subprocess

from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import Row, Target, in_turn, row
from tests.bench.pool import FIRST_ID, BenchPool, Command
from tests.bench.references import booking_only, no_op

CONNECTIONS = 32
REQUESTS = 10_000
LIST_LENGTH = 32
RANDOM = "__rand_int__"


def single(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """A dispatch of one request at 16 ranks against a no-op, bare and with the same keys and arguments."""
    pool, writes = BenchPool(server, 16), BenchPool(server, 16, "writes")
    dispatch = _dispatch_of(pool, 1)
    like = _dispatch_of(writes, 1)
    sides = (
        lambda: _per_second(pool, dispatch),
        lambda: _per_second(writes, no_op(writes)),
        lambda: _per_second(writes, no_op(writes, like)),
        lambda: _per_second(writes, booking_only(writes, like)),
    )
    try:
        ours, bare, dressed, booking = in_turn(2 if quick else 12, *sides)
    finally:
        pool.close()
        writes.close()
    what = "dispatches per second"
    return [
        row(what, "no-op EVALSHA, same KEYS and ARGV", ours, dressed, "%", Target("at least", 45)),
        row(what, "no-op EVALSHA, no keys", ours, bare, "%"),
        row(what, "booking-only script", ours, booking, "%"),
        row("no-op, same KEYS and ARGV", "no-op EVALSHA, no keys", dressed, bare, "%"),
    ]


def lists(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """Requests per second in lists of 32 against singles."""
    pool = BenchPool(server, 16)
    sides = (
        lambda: LIST_LENGTH * _per_second(pool, _dispatch_of(pool, LIST_LENGTH), REQUESTS // LIST_LENGTH),
        lambda: _per_second(pool, _dispatch_of(pool, 1)),
    )
    try:
        many, one = in_turn(2 if quick else 12, *sides)
    finally:
        pool.close()
    return [row("requests per second, lists of 32", "singles", many, one, target=Target("at least", 4))]


def _dispatch_of(pool: BenchPool, count: int) -> Command:
    """A dispatch whose ids redis-benchmark makes distinct: 19 digits, and a request id as long as a uuid4."""
    command = pool.command(pool.dispatch(pool.requests(count)))
    triples = list(command[FIRST_ID:])
    for at in range(0, len(triples), 3):
        triples[at] = f"4000000{RANDOM}"
        triples[at + 2] = f"deadbeef-dead-4eef-dead-{RANDOM}"
    return (*command[:FIRST_ID], *triples)


def _per_second(pool: BenchPool, command: Command, requests: int = REQUESTS) -> float:
    pool.reset()
    port, clients = str(pool.port), str(CONNECTIONS)
    options = ["-p", port, "-c", clients, "-n", str(requests), "-r", "1000000000", "-P", "1", "-e", "--csv"]
    words = [str(word) for word in command]
    done = subprocess.run(["redis-benchmark", *options, *words], capture_output=True, text=True, check=True)
    *_, last = csv.reader(done.stdout.splitlines())
    return float(last[1])
