"""Embeddings in a real SGLang: the controller places them by the pool and the schedulers acknowledge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from balancer import Dispatcher, Settings
from balancer.admin import PoolAdmin
from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.server import SGLangServer, what_is_missing
from tests.engines.sglang.test_live import PORT, is_at_rest

Eventually = Callable[..., float]
POOL = "embeddings"


@pytest.fixture(scope="module")
def server(redis_process: EmbeddedRedis) -> Iterator[SGLangServer]:
    assert not what_is_missing(), what_is_missing()
    there = {"DP_BALANCER_URL": redis_process.url, "DP_BALANCER_POOL": POOL, "DP_BALANCER_ENGINE": "e"}
    with SGLangServer(PORT, "--dp", "2", "--is-embedding", **there) as server:
        yield server


def test_single_embeddings_and_lists_are_placed_one_by_one_and_leave_nothing(
    server: SGLangServer, redis_process: EmbeddedRedis, plain: redis.Redis, eventually: Eventually
) -> None:
    settings = Settings(url=redis_process.url, pool=POOL, budget_ms=5_000)
    PoolAdmin(settings).configure(policy="round_robin")  # its turn counts all that it has placed

    def embed(asked: str | list[str]) -> int:
        answer = server.post("/v1/embeddings", {"model": "tiny", "input": asked})
        assert all(len(each["embedding"]) > 1 for each in answer["data"])
        return len(answer["data"])

    before = int(plain.hget(f"dpb:{{{POOL}}}:pool", "turn") or 0)
    with Dispatcher(settings) as outside, ThreadPoolExecutor(8) as pool:
        sent = sum(pool.map(embed, ["some words to embed " * (1 + at) for at in range(20)]))
        sent += embed([f"one of a list {at}" for at in range(12)])
        eventually(lambda: is_at_rest(outside.snapshot()), "all were acknowledged")
        assert outside.snapshot().expired == 0
    assert sent == 32
    assert int(plain.hget(f"dpb:{{{POOL}}}:pool", "turn") or 0) - before == sent
