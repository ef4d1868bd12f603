"""vLLM's other ways to serve several ranks: on several nodes, with a port for each rank, by the Rust frontend."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from balancer import Dispatcher, Placement
from balancer.marker import marked
from tests.engines.vllm.kit import PORT, VllmServer, at_once, at_rest, need_vllm, redis_on, until

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


@contextlib.contextmanager
def deployed(nodes: list[VllmServer]) -> Iterator[None]:
    """The nodes of one deployment: none is ready before the others are."""
    try:
        with ThreadPoolExecutor(len(nodes)) as starting:
            list(starting.map(VllmServer.start, nodes))
        with Dispatcher(nodes[0].settings) as looker:
            until(lambda: len(looker.snapshot().ranks) == nodes[0].ranks, "all ranks are in the pool", 60)
        yield
    finally:
        for node in nodes:
            node.stop()


@contextlib.contextmanager
def held_up(node: VllmServer) -> Iterator[None]:
    """A node whose EngineCores receive nothing: what is sent to them stays in flight."""
    pids = node.engine_pids()
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_two_nodes_of_a_hybrid_deployment_share_a_pool_and_each_places_on_its_own_ranks(redis_url: str) -> None:
    def node(number: int) -> VllmServer:
        local = ("--data-parallel-size-local", "2", "--data-parallel-start-rank", str(2 * number))
        meet = ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(PORT + 75))
        environment = {"DP_BALANCER_ENGINE": "hybrid"}
        flags = ("--data-parallel-hybrid-lb", *local, *meet)
        port = PORT + 70 + number
        return VllmServer(f"hybrid-{number}", redis_url, port, 4, 2, "tiny-moe", True, flags, environment, "hybrid")

    nodes = [node(0), node(1)]
    with deployed(nodes), Dispatcher(nodes[0].settings) as dispatcher:
        for number, behind in enumerate(nodes):  # the dispatcher inside
            own = {f"hybrid/{2 * number}": 2, f"hybrid/{2 * number + 1}": 2}
            with held_up(behind):
                answers: list[tuple[int, str]] = []
                works = [functools.partial(behind.post, "/v1/completions", COMPLETION)] * 4
                sending = threading.Thread(target=lambda: answers.extend(at_once(works)))  # noqa: B023
                sending.start()
                until(lambda: in_flight(dispatcher) == own, f"two bookings on each rank of node {number}")  # noqa: B023
            sending.join()
            assert [status for status, _ in answers] == [200] * 4, answers
            at_rest(behind.settings)
        for placement in placed_everywhere(dispatcher, 4):  # a dispatcher outside, before both
            number, local = divmod(placement.index, 2)  # a node counts from its own first rank
            check_acknowledged(nodes[number], placement, dispatcher, {"X-data-parallel-rank": str(local)})
        at_rest(nodes[0].settings)
        assert dispatcher.snapshot().expired == 0


def test_with_a_server_for_each_rank_the_dispatcher_outside_chooses_the_server(redis_url: str) -> None:
    def server(rank: int) -> VllmServer:
        meet = ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(PORT + 85))
        flags = ("--data-parallel-external-lb", "--data-parallel-rank", str(rank), *meet)
        environment = {"DP_BALANCER_ENGINE": "external"}
        port = PORT + 80 + rank
        return VllmServer(f"external-{rank}", redis_url, port, 2, 1, "tiny-moe", True, flags, environment, "external")

    servers = [server(0), server(1)]
    with deployed(servers), Dispatcher(servers[0].settings) as dispatcher:
        for placement in placed_everywhere(dispatcher, 2):
            check_acknowledged(servers[placement.index], placement, dispatcher, {})
        for behind in servers:  # whoever comes without a dispatcher has chosen the rank by its port
            assert behind.post("/v1/completions", COMPLETION)[0] == 200
        at_rest(servers[0].settings)
        assert dispatcher.snapshot().expired == 0


def in_flight(dispatcher: Dispatcher) -> dict[str, int]:
    """How many bookings each rank has, of those that have any."""
    ranks = dispatcher.snapshot().ranks
    return {rank.rank: rank.in_flight_requests for rank in ranks if rank.in_flight_requests}


def placed_everywhere(dispatcher: Dispatcher, ranks: int) -> list[Placement]:
    """Requests that are booked and not sent yet, one on each rank."""
    placements = [dispatcher.dispatch(f"everywhere-{next(numbers)}", 10) for _ in range(ranks)]
    assert {placement.index for placement in placements} == set(range(ranks))
    return placements


def check_acknowledged(
    server: VllmServer, placement: Placement, dispatcher: Dispatcher, headers: dict[str, str]
) -> None:
    """A request placed there is answered, received by its rank and no other of its server, and its booking ends."""
    before = received_by(server)
    mark = {"X-Request-Id": marked(placement.request.request_id)}
    status, text = server.post("/v1/completions", COMPLETION, headers | mark)
    assert status == 200, text
    until(lambda: placement.rank not in in_flight(dispatcher), "the booking has ended")
    after = received_by(server)
    assert [index for index in after if after[index] > before.get(index, 0)] == [placement.index]


def received_by(server: VllmServer) -> dict[int, int]:
    """How many ids each rank of a server has received."""
    return {int(rank): sum(line.received for line in lines.values()) for rank, lines in server.audited_steps().items()}


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
