"""Two SGLang servers in one pool: outside dispatchers choose among all ranks of both, each controller among its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from balancer import Dispatcher, Placement, Request, Settings
from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.server import SGLangServer, what_is_missing
from tests.engines.sglang.test_live import PORT, is_at_rest

Eventually = Callable[..., float]


@pytest.fixture(scope="module")
def servers(redis_process: EmbeddedRedis) -> Iterator[dict[str, SGLangServer]]:
    assert not what_is_missing(), what_is_missing()
    made = {
        name: SGLangServer(
            PORT + 300 * (1 + number),  # SGLang takes some ports above its own
            "--dp",
            "2",
            "--sleep-on-idle",
            DP_BALANCER_URL=str(redis_process.url),
            DP_BALANCER_POOL="both",
            DP_BALANCER_ENGINE=name,
        )
        for number, name in enumerate(("one", "other"))
    }
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        for server in made.values():
            stack.callback(server.stop)
        list(pool.map(SGLangServer.start, made.values()))
        yield made


def test_an_outside_dispatcher_fills_all_ranks_of_both(
    servers: dict[str, SGLangServer], redis_process: EmbeddedRedis, eventually: Eventually
) -> None:
    with Dispatcher(Settings(url=redis_process.url, pool="both", budget_ms=5_000)) as outside:
        eventually(lambda: len(outside.snapshot().ranks) == 4, "both engines have joined")
        requests = [Request(f"both-{time.monotonic_ns()}-{number}", 50) for number in range(16)]
        placements = [answer for answer in outside.dispatch_many(requests) if isinstance(answer, Placement)]
        ranks = [placement.rank for placement in placements]
        assert sorted(set(ranks)) == ["one/0", "one/1", "other/0", "other/1"]
        assert {ranks.count(rank) for rank in ranks} == {4}

        def send(placement: Placement) -> int:
            server, id_ = servers[placement.engine], placement.request.request_id
            answer = server.generate(50, 4, rid=id_, routed_dp_rank=placement.index)
            return int(answer["meta_info"]["dp_rank"])

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(send, placements)) == [placement.index for placement in placements]
        eventually(lambda: is_at_rest(outside.snapshot()), "all were acknowledged, by the server that got them")
        assert outside.snapshot().expired == 0


def test_each_servers_own_controller_stays_within_it(
    servers: dict[str, SGLangServer], redis_process: EmbeddedRedis, eventually: Eventually
) -> None:
    """A controller can send to its own ranks only, though the other server's are empty."""
    with Dispatcher(Settings(url=redis_process.url, pool="both", budget_ms=5_000)) as outside:
        sampling = {"max_new_tokens": 4, "ignore_eos": True}
        batch = {"input_ids": [[9] * 200 for _ in range(8)], "sampling_params": sampling}
        answers = servers["one"].post("/generate", batch)
        assert sorted(answer["meta_info"]["dp_rank"] for answer in answers) == [0] * 4 + [1] * 4
        eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")
        assert outside.snapshot().expired == 0
