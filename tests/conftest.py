"""What all tests share: one real Redis for the run, a clean pool for each test, and waiting for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from balancer import Settings
from balancer.embedded import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def client(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A plain client on an empty server: what `redis-cli` would see."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True, protocol=2) as plain:
        plain.flushall()
        yield plain
        leaked = [key for key in plain.scan_iter("*") if not key.startswith("dpb:{")]
        assert not leaked, f"keys outside the project's prefix: {leaked}"
        for key in plain.scan_iter("dpb:{*}:*"):
            if not key.endswith(":pool"):
                assert plain.pttl(key) > 0, f"{key} never ends"


@pytest.fixture
def settings(redis_server: EmbeddedRedis, client: redis.Redis) -> Settings:
    """Settings of a dispatcher or reporter on the pool `p`; the budget leaves room for a crowded machine."""
    return Settings(url=redis_server.url, pool="p", budget_ms=2_000)


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """Wait until a condition holds: `eventually(lambda: x == 1, "x becomes 1")`."""

    def wait(condition: Callable[[], object], what: str, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
            time.sleep(0.005)

    return wait
