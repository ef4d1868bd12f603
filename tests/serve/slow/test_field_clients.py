"""The field's own load generators and an engine simulator of others, through real replicas: zero failures.

They come from the kits in ../shared/engines (their README says how to install them; ENGINES_HOME says where they live).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from balancer import PoolAdmin, Settings
from balancer.embedded import EmbeddedRedis
from tests.serve.engines import kit
from tests.serve.replica import Replica, free_port

KITS = Path(__file__).parents[4] / "shared" / "engines"
HOME = Path(os.environ.get("ENGINES_HOME", Path.home() / ".cache" / "engines"))
MOCKERS = 3


def need(path: Path, what: str) -> None:
    """Skip, saying what is missing; in CI that is a failure."""
    if not path.exists():
        reason = f"{what} is not installed: no {path.name} under {path.parent} (see ../shared/engines/README.md)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=500, env=os.environ | env
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


class Front:
    """A replica, what is behind it, and the pool to be left empty."""

    def __init__(self, replica: Replica, redis_url: str) -> None:
        self.replica = replica
        self._admin = PoolAdmin(Settings(url=redis_url, pool="p", budget_ms=5_000))

    def close(self) -> None:
        self._admin.close()

    def in_flight(self) -> int:
        return self._admin.snapshot().bookings


@contextmanager
def mockers() -> Iterator[list[str]]:
    """Dynamo's mocker: endpoints of one rank each, no hook inside."""
    need(Path(os.environ.get("MOCKER_VENV", HOME / "mocker")), "Dynamo's mocker")
    first = free_port()
    run(KITS / "mocker" / "serve", str(MOCKERS), str(first), "--max-num-seqs", "64")
    ports = [str(first + number) for number in range(MOCKERS)]
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        run(KITS / "mocker" / "stop", *ports)


@pytest.fixture(scope="module", params=["mock", "mocker", "sglang"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A replica before our mock engine (as a newcomer starts it), before Dynamo's mocker, before a real SGLang."""
    with ExitStack() as stack:
        engines: list[str] = []
        if request.param == "mocker":
            engines = stack.enter_context(mockers())
        elif request.param == "sglang":
            kit.need("sglang")
            engines = [f"{stack.enter_context(kit.running('sglang'))},kind=sglang,dp={kit.RANKS}"]
        server = stack.enter_context(EmbeddedRedis())
        log = tmp_path_factory.mktemp("front") / "replica.log"
        replica = stack.enter_context(Replica(server.url, engines, log=log))
        yield stack.enter_context(closing(Front(replica, server.url)))


@pytest.fixture
def nothing_is_booked(front: Front, eventually: Callable[..., None]) -> Iterator[None]:
    """When the test is over, nothing is in flight any more."""
    yield
    eventually(lambda: front.in_flight() == 0, "nothing is in flight", within_s=30)


@pytest.mark.usefixtures("nothing_is_booked")
@pytest.mark.parametrize("backend", ["sglang-oai", "sglang-oai-chat"])
def test_sglangs_bench_client(backend: str, front: Front) -> None:
    need(Path(os.environ.get("SGLANG_VENV", HOME / "sglang")), "SGLang")
    flags = ("--backend", backend, "--num-prompts", "100", "--request-rate", "20")
    said = run(KITS / "bench-sglang", front.replica.url, *flags)
    assert re.findall(r"Successful requests:\s+(\d+)", said) == ["100"], said[-3000:]


@pytest.mark.usefixtures("nothing_is_booked")
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_bench_client(backend: str, front: Front) -> None:
    need(Path(os.environ.get("VLLM_VENV", HOME / "vllm")), "vLLM")
    flags = ("--backend", backend, "--num-prompts", "100", "--request-rate", "20")
    said = run(KITS / "vllm" / "bench", front.replica.url, *flags)
    assert re.findall(r"Successful requests:\s+(\d+)", said) == ["100"], said[-3000:]
    assert re.findall(r"Failed requests:\s+(\d+)", said) in ([], ["0"])


@pytest.mark.usefixtures("nothing_is_booked")
def test_openais_package(front: Front) -> None:
    with openai.OpenAI(base_url=f"{front.replica.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8}
        whole = client.chat.completions.create(**asked)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8 or whole.choices[0].finish_reason == "stop"
        pieces = list(client.chat.completions.create(**asked, stream=True))
        assert any(piece.choices and piece.choices[0].delta.content for piece in pieces)
        assert pieces[-1].choices[0].finish_reason
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tool = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": schema}}
        answer = client.chat.completions.create(**asked, tools=[tool], tool_choice="auto")
        assert answer.choices[0].finish_reason
        with client.chat.completions.create(**{**asked, "max_tokens": 2_000}, stream=True) as running:
            next(iter(running))  # and leaves


@pytest.fixture
def mocker() -> Iterator[list[str]]:
    with mockers() as urls:
        yield urls


def test_dynamos_mocker_behind_two_replicas(
    mocker: list[str],
    serve: Callable[..., Replica],
    nothing_booked: Callable[[], None],
) -> None:
    replicas = [serve(*mocker) for _ in range(2)]
    for number in range(30):
        status, _, body = replicas[number % 2].chat(max_tokens=8, stream=number % 3 == 0, n=1)
        assert status == 200, body
        assert b"[DONE]" in body or json.loads(body)["usage"]["completion_tokens"] == 8
    ranks = [re.findall(r'"rank":"([^"]+)"', replica.log.read_text()) for replica in replicas]
    counts = {rank: sum(row.count(rank) for row in ranks) for rank in {rank for row in ranks for rank in row if rank}}
    assert len(counts) == MOCKERS, counts
    assert min(counts.values()) >= 5, counts
    nothing_booked()


def test_a_stream_cancelled_at_dynamos_mocker_leaves_nothing(
    mocker: list[str], serve: Callable[..., Replica], nothing_booked: Callable[[], None]
) -> None:
    replica = serve(*mocker)
    connections = [replica.connect() for _ in range(10)]
    for connection in connections:
        document = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 4000}
        connection.request("POST", "/v1/chat/completions", json.dumps(document), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline()
        answer.close()
        connection.close()
    nothing_booked()
    assert replica.chat(max_tokens=4)[0] == 200
