"""vLLM's other ways to serve several ranks: a port for each rank, and the Rust frontend. Dispatchers stand outside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from balancer import Dispatcher
from balancer.marker import marked
from tests.engines.vllm.kit import PORT, VllmServer, at_rest, need_vllm, redis_on, until

numbers = count(1)
COMPLETION = {"prompt": "hello there", "max_tokens": 4}


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    need_vllm()
    with redis_on(PORT + 401) as url:
        yield url


def test_with_one_port_for_each_rank_a_request_goes_to_the_port_and_needs_no_header(redis_url: str) -> None:
    port = PORT + 20
    supervisor = ("--data-parallel-size-local", "2", "--data-parallel-supervisor-port", str(port + 9))
    flags = ("--data-parallel-multi-port-external-lb", *supervisor)
    # vLLM refuses this mode for dense models: their ranks are servers of their own.
    server = VllmServer("ports", redis_url, port, 2, 1, "tiny-moe", flags=flags)
    server.start()
    try:
        with Dispatcher(server.settings) as dispatcher:
            until(lambda: len(dispatcher.snapshot().ranks) == 2, "both ranks are in the pool", 600)
            until(lambda: VllmServer("ports", redis_url, port + 1).is_well(), "the second port answers", 600)
            for _ in range(6):
                request_id = f"ports-{next(numbers)}"
                placement = dispatcher.dispatch(request_id, 10)
                behind = VllmServer("ports", redis_url, port + placement.index)
                before = acknowledged(server)
                status, text = behind.post("/v1/completions", COMPLETION, {"X-Request-Id": marked(request_id)})
                assert status == 200, text
                until(lambda: dispatcher.snapshot().bookings == 0, "the booking has ended")
                after = acknowledged(server)
                assert after[placement.index] == before[placement.index] + 1, "by the rank that was chosen"
            at_rest(server.settings)
    finally:
        server.stop()


def acknowledged(server: VllmServer) -> list[int]:
    """How many steps of each rank have received something."""
    steps = server.audited_steps()
    return [sum(line.received > 0 for line in steps.get(str(rank), {}).values()) for rank in range(2)]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_rust_frontend_passes_rank_and_mark_on(rust: VllmServer, path: str) -> None:
    body = COMPLETION if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    with Dispatcher(rust.settings) as dispatcher:
        for _ in range(4):
            request_id = f"rust-{next(numbers)}"
            placement = dispatcher.dispatch(request_id, 10)
            before = acknowledged(rust)
            headers = {"X-Request-Id": marked(request_id), "X-data-parallel-rank": str(placement.index)}
            status, text = rust.post(path, body, headers)
            assert status == 200, text
            until(lambda: dispatcher.snapshot().bookings == 0, "the booking has ended")
            assert acknowledged(rust)[placement.index] == before[placement.index] + 1
    at_rest(rust.settings)


def test_the_rust_frontend_is_not_covered_by_the_dispatcher_inside(rust: VllmServer) -> None:
    assert rust.post("/v1/completions", COMPLETION)[0] == 200
    at_rest(rust.settings)
    with Dispatcher(rust.settings) as looker:
        assert looker.snapshot().expired == 0, "nothing was booked: vLLM's own balancer chose, the ranks reported"


@pytest.fixture(scope="module")
def rust(redis_url: str) -> Iterator[VllmServer]:
    """vLLM's Rust frontend before two ranks."""
    environment = {"VLLM_USE_RUST_FRONTEND": "1"}
    server = VllmServer("rust", redis_url, PORT + 30, ranks=2, api_servers=1, environment=environment)
    server.start()
    yield server
    server.stop()
