"""Prefill and decode on servers of their own, with real KV transfer between them: a pool each, both counts right.

The transfer is Mooncake's, over TCP, which needs no GPU. It is not in the kit, so `make test-sglang` leaves this file
to a verb of its own, which fails where DPB_MOONCAKE names no folder with it:

    pip install --no-deps --target FOLDER mooncake-transfer-engine-non-cuda    # needs the system's libibverbs1
    make test-sglang-pd DPB_MOONCAKE=FOLDER
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from balancer import Dispatcher, Settings
from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.probe import PROBE
from tests.engines.sglang.server import SGLangServer, what_is_missing
from tests.engines.sglang.test_live import PORT, agrees, is_at_rest, requests_held

Eventually = Callable[..., float]

MOONCAKE = os.environ.get("DPB_MOONCAKE", "")

BOOTSTRAP_PORT = PORT + 80
ATTENTION = ("--tp", "2", "--dp", "2", "--enable-dp-attention")
CHUNK = 256


def server(role: str, port: int, redis: EmbeddedRedis, *flags: str) -> SGLangServer:
    return SGLangServer(
        port,
        *ATTENTION,
        *("--disaggregation-mode", role, "--disaggregation-transfer-backend", "mooncake"),
        *("--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT), "--chunked-prefill-size", str(2 * CHUNK)),
        *flags,
        DP_BALANCER_URL=str(redis.url),
        DP_BALANCER_POOL=role,
        DP_BALANCER_ENGINE=role,
        PYTHONPATH=os.pathsep.join((str(PROBE), MOONCAKE)),
        SGLANG_PLUGINS="dp_balancer,dpb_probe",
        DPB_PAGEABLE="1",
        MC_FORCE_TCP="1",
        MOONCAKE_PROTOCOL="tcp",
    )


@dataclass
class Pair:
    """A prefill and a decode server, asked as a router asks them: both at once, with the same room."""

    prefill: SGLangServer
    decode: SGLangServer
    _rooms: Any = field(default_factory=lambda: count(1))

    def generate(self, tokens: int, new_tokens: int) -> tuple[Any, Any]:
        """The answers of both."""
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": BOOTSTRAP_PORT, "bootstrap_room": next(self._rooms)}
        body: dict[str, Any] = {
            "input_ids": random.choices(range(5, 95), k=tokens),  # new ones: none is cached
            "sampling_params": {"max_new_tokens": new_tokens, "ignore_eos": True},
            **where,
        }
        with ThreadPoolExecutor(2) as both:
            one, other = (both.submit(each.post, "/generate", body) for each in (self.prefill, self.decode))
            return one.result(), other.result()


@pytest.fixture(scope="module", autouse=True)
def all_is_here() -> None:
    assert MOONCAKE, "DPB_MOONCAKE names no folder with Mooncake's transfer engine"
    assert not what_is_missing(), what_is_missing()


@pytest.fixture(scope="module")
def pair(redis_process: EmbeddedRedis) -> Iterator[Pair]:
    prefill = server("prefill", PORT, redis_process, "--load-balance-method", "total_tokens")
    # What a decode server does by default needs a GPU: a pinned buffer for retracted requests, an all-to-all of logits.
    without_gpu = ("--disaggregation-decode-retraction-backup", "cpu_tensor", "--no-enable-tp-lm-head-all-to-all")
    decode = server("decode", PORT + 300, redis_process, *without_gpu)
    with ExitStack() as stack:
        stack.callback(prefill.stop)
        stack.callback(decode.stop)
        with ThreadPoolExecutor(2) as both:
            list(both.map(SGLangServer.start, (prefill, decode)))
        yield Pair(prefill, decode)


@pytest.fixture
def pools(pair: Pair, redis_process: EmbeddedRedis) -> Iterator[dict[str, Dispatcher]]:
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(Dispatcher(Settings(url=redis_process.url, pool=role, budget_ms=5_000)))
            for role in ("prefill", "decode")
        }


def test_following_the_bootstrap_room_is_refused_with_the_flag_to_set(redis_process: EmbeddedRedis) -> None:
    """What `auto` means on prefill: there the room ties the request to a rank, and another one fails it."""
    with server("prefill", PORT, redis_process) as alone:
        (line,) = alone.said("does not place the requests of this server")
        assert "follow_bootstrap_room" in line
        assert "--load-balance-method total_tokens" in line
        assert not alone.said("places the requests of engine")


def test_each_role_fills_its_own_pool_and_both_come_to_rest(
    pair: Pair, pools: dict[str, Dispatcher], eventually: Eventually
) -> None:
    with ThreadPoolExecutor(8) as streams:
        answers = list(streams.map(lambda tokens: pair.generate(tokens, 16), [10, 40, 90, 200] * 8))
    for at, role in enumerate(pools):
        assert {answer[at]["meta_info"]["dp_rank"] for answer in answers} == {0, 1}, role
    assert [answer["meta_info"]["completion_tokens"] for _, answer in answers] == [16] * 32
    for role, pool in pools.items():
        eventually(lambda pool=pool: is_at_rest(pool.snapshot()), f"nothing is held or in flight in {role}")
        assert pool.snapshot().expired == 0
    eventually(lambda: agrees(pools["prefill"].snapshot(), pair.prefill.counted()), "prefill's own counts are in Redis")
    eventually(lambda: agrees(pools["decode"].snapshot(), pair.decode.counted()), "decode's own counts are in Redis")


def test_a_request_counts_where_it_is(pair: Pair, pools: dict[str, Dispatcher], eventually: Eventually) -> None:
    """A long prompt is whole in prefill's pool from its first chunk on, then gone there; in decode's until its end."""
    seen: list[tuple[int, int]] = []
    requests: list[int] = []
    sender = threading.Thread(target=pair.generate, args=(3_000, 400))
    sender.start()
    while sender.is_alive():
        loads = [max(rank.load_tokens for rank in pool.snapshot().ranks) for pool in pools.values()]
        seen.append((loads[0], loads[1]))
        requests.append(requests_held(pools["prefill"].snapshot()))
        time.sleep(0.005)
    sender.join()
    prefilling = [load for load, _ in seen if load]
    assert min(prefilling) >= 3_000
    assert max(prefilling) <= 3_010
    assert max(load for _, load in seen) >= 3_390
    assert max(requests) == 1, "computed or on its way: prefill has one request"
    assert any(not first and second >= 3_000 for first, second in seen), "prefill is free while decode goes on"
    for pool in pools.values():
        eventually(lambda pool=pool: is_at_rest(pool.snapshot()), "nothing is left")


def test_decode_counts_requests_whose_kv_is_on_its_way(
    pair: Pair, pools: dict[str, Dispatcher], eventually: Eventually
) -> None:
    """Received by decode, not yet prefilled: SGLang's active tokens leave these out, and a burst would herd."""
    with ThreadPoolExecutor(8) as streams:
        answers = [streams.submit(pair.generate, 1_500, 8) for _ in range(8)]
        eventually(lambda: requests_held(pools["decode"].snapshot()) == 8, "decode has them all")
        # A prefill rank takes in what has come to it after its step only, and its steps are long here.
        at_prefill = [(rank.requests, rank.in_flight_requests) for rank in pools["prefill"].snapshot().ranks]
        assert sum(map(sum, at_prefill)) >= 6, f"and prefill all that it has not handed over: {at_prefill}"
        held = [rank.holding_tokens for rank in pools["decode"].snapshot().ranks]
        assert min(held) >= 4 * 1_500, "spread evenly, and counted while prefill is at work"
        assert [len(answer.result()) for answer in answers] == [2] * 8
    for pool in pools.values():
        eventually(lambda pool=pool: is_at_rest(pool.snapshot()), "nothing is left")
