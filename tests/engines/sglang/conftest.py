"""Real engines. Where one is missing these tests fail and say what to install: nothing here is skipped.

`make test-sglang` runs all but test_pd, which needs more than the kit has: `make test-sglang-pd`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.link import Link


@pytest.fixture(scope="module")
def redis_process() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def link(redis_process: EmbeddedRedis) -> Iterator[Link]:
    """The engine's way to Redis."""
    link = Link(redis_process.port)
    yield link
    link.close()


@pytest.fixture
def plain(redis_process: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_process.url, decode_responses=True, protocol=2) as client:
        yield client


@pytest.fixture
def eventually() -> Callable[..., float]:
    """Wait until a condition holds; returns how many seconds that took."""

    def wait(condition: Callable[[], object], what: str, within_s: float = 60.0) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
            time.sleep(0.02)
        return time.monotonic() - began

    return wait
