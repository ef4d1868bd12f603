"""`balancer serve` before vLLM's other forms: two nodes (hybrid), a server for each rank (external), a port for each.

The rank that the front door has booked is the one that has served the request, by vLLM's own count of each rank.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.kit import PORT, VllmServer, at_rest, need_vllm, redis_on, until
from tests.serve.replica import Replica

REQUESTS = 20
_SUCCESS = re.compile(r'^vllm:request_success_total\{.*?engine="(\d+)".*\} ([0-9.]+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    need_vllm()
    with redis_on(PORT + 402) as url:
        yield url


def hybrid(redis_url: str) -> tuple[list[VllmServer], list[tuple[int, int, int]]]:
    """Two nodes of two ranks: servers, and for each address its port, first rank and number of ranks."""

    def node(number: int) -> VllmServer:
        local = ("--data-parallel-size-local", "2", "--data-parallel-start-rank", str(2 * number))
        meet = ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(PORT + 125))
        flags = ("--data-parallel-hybrid-lb", *local, *meet)
        return server(redis_url, "hybrid", PORT + 120 + number, 4, 2, flags)

    return [node(0), node(1)], [(PORT + 120, 0, 2), (PORT + 121, 2, 2)]


def external(redis_url: str) -> tuple[list[VllmServer], list[tuple[int, int, int]]]:
    """A server for each of two ranks."""

    def one(rank: int) -> VllmServer:
        meet = ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(PORT + 135))
        flags = ("--data-parallel-external-lb", "--data-parallel-rank", str(rank), *meet)
        return server(redis_url, "external", PORT + 130 + rank, 2, 1, flags)

    return [one(0), one(1)], [(PORT + 130, 0, 1), (PORT + 131, 1, 1)]


def multi_port(redis_url: str) -> tuple[list[VllmServer], list[tuple[int, int, int]]]:
    """One server with a port for each of two ranks."""
    supervisor = ("--data-parallel-size-local", "2", "--data-parallel-supervisor-port", str(PORT + 149))
    flags = ("--data-parallel-multi-port-external-lb", *supervisor)
    return [server(redis_url, "ports", PORT + 140, 2, 1, flags)], [(PORT + 140, 0, 1), (PORT + 141, 1, 1)]


def server(redis_url: str, form: str, port: int, ranks: int, api_servers: int, flags: tuple[str, ...]) -> VllmServer:
    environment = {"DP_BALANCER_ENGINE": form, "DP_BALANCER_DISPATCH": "0"}
    name = f"serve-{form}-{port}"
    return VllmServer(name, redis_url, port, ranks, api_servers, "tiny-moe", False, flags, environment, f"serve-{form}")


@pytest.mark.parametrize("form", [hybrid, external, multi_port])
def test_the_rank_that_was_booked_has_served_the_request(form: Any, redis_url: str, tmp_path: Path) -> None:
    servers, addresses = form(redis_url)
    settings, name = servers[0].settings, servers[0].environment["DP_BALANCER_ENGINE"]
    words = [f"http://127.0.0.1:{port},kind=vllm,dp={count},hook={name}/{first}" for port, first, count in addresses]
    try:
        with ThreadPoolExecutor(len(servers)) as starting:
            list(starting.map(VllmServer.start, servers))
        for port, _, _ in addresses:
            until(lambda: VllmServer("any", redis_url, port).is_well(), f"port {port} answers", 600)  # noqa: B023
        before = served(addresses)
        log = tmp_path / "replica.log"
        with Replica(redis_url, words, "--pool", settings.pool, log=log) as replica:
            asked = {"model": "tiny", "prompt": "hello there", "max_tokens": 8}

            def ask(number: int) -> int:
                return replica.request("POST", "/v1/completions", asked | {"stream": bool(number % 2)}, None, 120)[0]

            with ThreadPoolExecutor(4) as clients:
                assert set(clients.map(ask, range(REQUESTS))) == {200}
            at_rest(settings)
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        booked = Counter(line["rank"] for line in lines if line["path"] == "/v1/completions")
        ranks = {f"{name}/{first + index}" for _, first, count in addresses for index in range(count)}
        assert set(booked) == ranks, "each rank had its turn"
        assert served(addresses) - before == {int(rank.rpartition("/")[2]): times for rank, times in booked.items()}
        print(f"\n    {name}: {dict(sorted(booked.items()))}")
    finally:
        for behind in servers:
            behind.stop()


def served(addresses: list[tuple[int, int, int]]) -> Counter[int]:
    """How many requests each rank has finished, by vLLM's own count. Engines are numbered by node or by deployment."""
    found: Counter[int] = Counter()
    for port, first, count in addresses:
        for engine, times in _SUCCESS.findall(metrics(port)):
            found[first + int(engine) % count] += int(float(times))
    return found


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())
