"""The field's own load generators and an engine simulator of others, through real replicas: zero failures.

They come from the kits in ../shared/engines (their README says how to install them; ENGINES_HOME says where they live).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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


@pytest.fixture
def before_a_mock_engine(serve: Callable[..., Replica]) -> Replica:
    """A replica as a newcomer starts it: without engines, so with the mock engine."""
    return serve("--no-access-log")


@pytest.mark.parametrize("backend", ["sglang-oai", "sglang-oai-chat"])
def test_sglangs_bench_client(backend: str, before_a_mock_engine: Replica, nothing_booked: Callable[[], None]) -> None:
    need(Path(os.environ.get("SGLANG_VENV", HOME / "sglang")), "SGLang")
    flags = ("--backend", backend, "--num-prompts", "100", "--request-rate", "20")
    said = run(KITS / "bench-sglang", before_a_mock_engine.url, *flags)
    (done,) = re.findall(r"Successful requests:\s+(\d+)", said)
    assert done == "100", said[-3000:]
    nothing_booked()


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_bench_client(backend: str, before_a_mock_engine: Replica, nothing_booked: Callable[[], None]) -> None:
    need(Path(os.environ.get("VLLM_VENV", HOME / "vllm")), "vLLM")
    flags = ("--backend", backend, "--num-prompts", "200", "--request-rate", "40")
    said = run(KITS / "vllm" / "bench", before_a_mock_engine.url, *flags)
    assert re.findall(r"Successful requests:\s+(\d+)", said) == ["200"], said[-3000:]
    assert re.findall(r"Failed requests:\s+(\d+)", said) in ([], ["0"])
    nothing_booked()


@pytest.fixture
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


def test_dynamos_mocker_behind_two_replicas(
    mockers: list[str],
    serve: Callable[..., Replica],
    nothing_booked: Callable[[], None],
) -> None:
    replicas = [serve(*mockers) for _ in range(2)]
    for number in range(30):
        status, _, body = replicas[number % 2].chat(max_tokens=8, stream=number % 3 == 0, n=1)
        assert status == 200, body
        assert b"[DONE]" in body or json.loads(body)["usage"]["completion_tokens"] == 8
    ranks = [re.findall(r'"rank":"([^"]+)"', replica.log.read_text()) for replica in replicas]
    counts = {rank: sum(row.count(rank) for row in ranks) for rank in {rank for row in ranks for rank in row if rank}}
    assert len(counts) == MOCKERS, counts
    assert min(counts.values()) >= 5, counts
    nothing_booked()


def test_dynamos_mocker_under_vllms_bench_client(
    mockers: list[str], serve: Callable[..., Replica], nothing_booked: Callable[[], None]
) -> None:
    need(Path(os.environ.get("VLLM_VENV", HOME / "vllm")), "vLLM")
    replica = serve(*mockers)
    flags = ("--backend", "openai-chat", "--num-prompts", "200", "--request-rate", "40")
    said = run(KITS / "vllm" / "bench", replica.url, *flags)
    assert re.findall(r"Successful requests:\s+(\d+)", said) == ["200"], said[-3000:]
    nothing_booked()


def test_a_stream_cancelled_at_dynamos_mocker_leaves_nothing(
    mockers: list[str], serve: Callable[..., Replica], nothing_booked: Callable[[], None]
) -> None:
    replica = serve(*mockers)
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
