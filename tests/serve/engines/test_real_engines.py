"""Real SGLang and real vLLM, without a hook, behind two replicas: the rank that was booked is the rank that works.

The engines come from the kits in ../shared/engines (`vllm/install` and so on); ENGINES_HOME says where they live. What
runs already, with two ranks, is used as it is: VLLM_URL, SGLANG_URL.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serve.engines import kit
from tests.serve.engines.kit import RANKS
from tests.serve.replica import Replica


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Kind and address of an engine with two ranks."""
    kind: str = request.param
    if url := os.environ.get(f"{kind.upper()}_URL"):
        yield kind, url
        return
    kit.need(kind)
    with kit.running(kind) as url:
        yield kind, url


@pytest.fixture
def replicas(engine: tuple[str, str], serve: Callable[..., Replica]) -> list[Replica]:
    kind, url = engine
    return [serve(f"{url},kind={kind},dp={RANKS}") for _ in range(2)]


def chat(replica: Replica, **more: Any) -> bytes:
    status, _, body = replica.chat(model="tiny", max_tokens=8, **more)
    assert status == 200, body
    return body


def ranks_booked(replicas: list[Replica]) -> Counter[str]:
    """Requests by rank index, as the access logs say."""
    text = "".join(replica.log.read_text() for replica in replicas)
    return Counter(re.findall(r'"status":200,.*?"rank":"[^"]+/(\d+)"', text))


def vllm_metric(url: str, name: str) -> Counter[str]:
    """A metric of vLLM by engine index, summed over its other labels."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
    found: Counter[str] = Counter()
    for index, value in re.findall(rf'^{name}{{engine="(\d+)".*}} (\S+)$', text, re.MULTILINE):
        found[index] += int(float(value))
    return found


def running(kind: str, url: str) -> int:
    """Requests that the engine works on."""
    if kind == "vllm":
        return vllm_metric(url, "vllm:num_requests_running").total()
    loads = json.load(urllib.request.urlopen(f"{url}/v1/loads", timeout=20))["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_each_request_runs_on_the_rank_that_was_booked_for_it(
    engine: tuple[str, str],
    replicas: list[Replica],
    nothing_booked: Callable[[], None],
    eventually: Callable[..., None],
) -> None:
    kind, url = engine
    before = vllm_metric(url, "vllm:request_success_total") if kind == "vllm" else Counter[str]()
    for number in range(20):
        replica = replicas[number % 2]
        assert json.loads(chat(replica))["usage"]["completion_tokens"] == 8
        assert chat(replica, stream=True).endswith(b"data: [DONE]\n\n")
    if kind == "vllm":
        after = vllm_metric(url, "vllm:request_success_total")
        assert after - before == ranks_booked(replicas)
    else:
        ran_on = []
        for _ in range(10):
            asked = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
            status, _, body = replicas[0].request("POST", "/generate", asked)
            assert status == 200, body
            ran_on.append(str(json.loads(body)["meta_info"]["dp_rank"]))

        def booked() -> list[str]:
            return re.findall(r'"path":"/generate".*"rank":"[^"]+/(\d+)"', replicas[0].log.read_text())

        eventually(lambda: len(booked()) == 10, "the last line of the log is written behind its answer", within_s=5)
        assert booked() == ran_on
    assert min(ranks_booked(replicas).values()) >= 10, "both ranks work"
    nothing_booked()


def test_several_answers_lists_and_token_ids_come_to_zero(
    replicas: list[Replica], nothing_booked: Callable[[], None]
) -> None:
    for replica in replicas:
        assert len(json.loads(chat(replica, n=2))["choices"]) == 2
        for prompt in ("one text", ["two", "texts"], [5, 6, 7, 8], [[5, 6], [7, 8, 9]]):
            asked = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
            status, _, body = replica.request("POST", "/v1/completions", asked)
            assert status == 200, body
    nothing_booked()


def test_a_client_that_leaves_stops_the_engines_work(
    engine: tuple[str, str],
    replicas: list[Replica],
    nothing_booked: Callable[[], None],
    eventually: Callable[..., None],
) -> None:
    connections: list[http.client.HTTPConnection] = []
    for number in range(6):
        connection = replicas[number % 2].connect(60)
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data:")
        answer.close()
        connections.append(connection)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    nothing_booked()
    eventually(lambda: running(*engine) == 0, "the engine works on nothing", within_s=60)
    print(f"\n    idle again after {time.monotonic() - began:.1f} s")
    assert json.loads(chat(replicas[0]))["choices"]
