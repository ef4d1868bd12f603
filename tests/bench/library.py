"""Latency of a dispatch through the library (`Dispatcher`, sync) against the seed's way, one after the other in turn.

Both hold the same number of ids in flight. A PING over a bare socket is measured beside them: no dispatch that asks
another process over TCP can be faster, so it says how much of a latency is anybody's to save.
"""

from __future__ import annotations

import socket
import statistics
import time
import uuid
from collections.abc import Callable

from balancer import Dispatcher, Settings
from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import Row, Target, in_turn, row
from tests.bench.pool import BenchPool
from tests.bench.seed import SeedBalancer

RANKS = 16
TARGETS = {0: Target("at least", 10), 5_000: Target("at least", 25)}
PER_ROUND = 50


def latency(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """p50 of each round of PER_ROUND dispatches, nothing and 5,000 ids in flight."""
    rows = []
    for in_flight, target in TARGETS.items():
        pool, seed = BenchPool(server, RANKS), SeedBalancer(RANKS, in_flight)
        if in_flight:
            pool.book(in_flight)
        dispatcher = Dispatcher(Settings(url=server.url, pool=pool.name, budget_ms=10_000))
        wire = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sides = (
            lambda dispatcher=dispatcher: _dispatch_us(dispatcher),
            lambda seed=seed: _seed_us(seed),
            lambda wire=wire: _p50_us(lambda: _ping(wire)),
        )
        try:
            ours, theirs, ping = in_turn(4 if quick else 20, *sides)
        finally:
            wire.close()
            dispatcher.close()
            seed.close()
            pool.close()
        state = f"{in_flight:,} in flight" if in_flight else "nothing in flight"
        rows.append(row(f"the seed's dispatch, {state}", "Dispatcher.dispatch", theirs, ours, target=target))
        if not in_flight:
            first = _first_us(len(ours))
            rows.append(row("the seed's first dispatch, by proxies", "Dispatcher.dispatch", first, ours, target=target))
        rows.append(row(f"the seed's dispatch, {state}", "PING over a bare socket", theirs, ping))
        rows.append(row(f"Dispatcher.dispatch, {state}", "PING over a bare socket", ours, ping))
    return rows


def _p50_us(action: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    spent = []
    for _ in range(PER_ROUND):
        begun = time.perf_counter_ns()
        action()
        spent.append((time.perf_counter_ns() - begun) / 1000)
        after()
    return statistics.median(spent)


def _dispatch_us(dispatcher: Dispatcher) -> float:
    ids = [str(uuid.uuid4()) for _ in range(PER_ROUND)]
    left, booked = iter(ids), iter(ids)
    return _p50_us(lambda: dispatcher.dispatch(next(left), 1_000), lambda: dispatcher.release(next(booked)))


def _seed_us(seed: SeedBalancer) -> float:
    chosen: list[int] = []
    return _p50_us(lambda: chosen.append(seed.dispatch(1_000)), lambda: seed.acknowledge(chosen[-1]))


def _first_us(rounds: int) -> list[float]:
    seed, spent = SeedBalancer(RANKS), []
    for _ in range(rounds):
        seed.as_proxies()
        begun = time.perf_counter_ns()
        seed.dispatch(1_000)
        spent.append((time.perf_counter_ns() - begun) / 1000)
    seed.close()
    return spent


def _ping(wire: socket.socket) -> None:
    wire.sendall(b"PING\r\n")
    wire.recv(64)
