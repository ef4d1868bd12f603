"""Real SGLang and real vLLM with our plugin inside, behind replicas: the hook and the front door know the same ids.

The engine's acknowledgement ends a booking while its answer still runs, whatever the endpoint; what the hook cannot
know by our id is released by the replica; and an engine without the plugin may stand beside it in the same pool.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from balancer import PoolAdmin, PoolSnapshot, Settings
from balancer.embedded import EmbeddedRedis
from tests.serve.engines import kit
from tests.serve.engines.kit import RANKS
from tests.serve.replica import Replica

Eventually = Callable[..., None]


class Hooked:
    """A Redis, an engine that reports to it as `hooked`, and replicas before it."""

    def __init__(self, kind: str, url: str, server: EmbeddedRedis, tmp: Path, stack: ExitStack) -> None:
        self.kind, self.url = kind, url
        self.word = f"{url},kind={kind},dp={RANKS},hook=hooked"
        self._server, self._tmp, self._stack = server, tmp, stack
        self._admin = PoolAdmin(Settings(url=server.url, pool="p", budget_ms=2_000))
        self._begun = 0

    def serve(self, *words: str, stack: ExitStack | None = None) -> Replica:
        self._begun += 1
        log = self._tmp / f"replica-{self._begun}.log"
        return (stack or self._stack).enter_context(Replica(self._server.url, words, log=log))

    def snapshot(self) -> PoolSnapshot:
        return self._admin.snapshot()

    def in_flight(self) -> tuple[int, int]:
        """Bookings, and the tokens of all ranks in flight."""
        seen = self.snapshot()
        return seen.bookings, sum(view.in_flight_tokens for view in seen.ranks)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def hooked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hooked]:
    kind: str = request.param
    kit.need(kind, with_plugin=True)
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis())
        environment = {
            "DP_BALANCER_URL": server.url,
            "DP_BALANCER_POOL": "p",
            "DP_BALANCER_ENGINE": "hooked",
            "DP_BALANCER_DISPATCH": "0",
            "DP_BALANCER_BUDGET_MS": "2000",
        }
        url = stack.enter_context(kit.running(kind, **environment))
        yield Hooked(kind, url, server, tmp_path_factory.mktemp(kind), stack)


@pytest.fixture(scope="module")
def replicas(hooked: Hooked) -> list[Replica]:
    return [hooked.serve(hooked.word) for _ in range(2)]


@pytest.fixture
def idle(hooked: Hooked, eventually: Eventually) -> Callable[[], None]:
    """Wait until nothing is booked and no rank holds anything."""

    def wait() -> None:
        def held() -> tuple[int, ...]:
            ranks = hooked.snapshot().ranks
            return (*hooked.in_flight(), sum(r.holding_tokens for r in ranks), sum(r.requests for r in ranks))

        eventually(lambda: not any(held()), "nothing is in flight, nothing is held", within_s=30)

    return wait


LONG = {"sglang": 300, "vllm": 1_500}
"""Tokens of an answer that runs for some seconds."""
PROMPT = "once upon a time " * 60
"""It outweighs what an answer has grown by when the next one is placed: loads are tokens, not requests."""


def lines(*replicas: Replica) -> list[dict[str, Any]]:
    """What the access logs say."""
    text = "".join(replica.log.read_text() for replica in replicas)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def stream(replica: Replica, tokens: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream that has begun."""
    connection = replica.connect(120)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data:")
    return connection, answer


def test_the_engine_ends_each_booking_while_its_answer_still_runs(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None], eventually: Eventually
) -> None:
    idle()
    streams = [stream(replicas[number % 2], 400) for number in range(4)]
    eventually(lambda: hooked.in_flight() == (0, 0), "acknowledged", within_s=30)
    held = {view.rank: view.requests for view in hooked.snapshot().ranks}
    assert held == {"hooked/0": 2, "hooked/1": 2}, "placed evenly, and counted by the engine itself"
    for connection, answer in streams:
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
    idle()


def test_every_endpoint_and_form_is_answered_and_leaves_nothing(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None]
) -> None:
    chat = {"messages": [{"role": "user", "content": "hello there"}]}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "n": 2}),
        ("/v1/chat/completions", {**chat, "stream": True}),
        *(("/v1/completions", {"prompt": prompt}) for prompt in ("a text", ["two", "texts"], [5, 6, 7], [[5, 6], [7]])),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 4}),
        ("/v1/messages", chat),
    ]
    if hooked.kind == "sglang":
        asked.append(("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 4}}))
    for number, (path, fields) in enumerate(asked):
        body = {"model": "tiny", "max_tokens": 4, **fields}
        status, _, answer = replicas[number % 2].request("POST", path, body, timeout_s=60)
        assert status == 200, (path, fields, answer)
    idle()


def test_a_client_that_leaves_takes_its_work_with_it(
    replicas: list[Replica], idle: Callable[[], None], hooked: Hooked
) -> None:
    for connection, answer in [stream(replicas[number % 2], 1500) for number in range(6)]:
        answer.close()
        connection.close()
    idle()


def test_openais_package_streams_calls_and_cancels(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None]
) -> None:
    with openai.OpenAI(base_url=f"{replicas[0].url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hello there"}]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
        assert whole.usage is not None
        assert whole.usage.completion_tokens
        pieces = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True))
        assert pieces[-1].choices[0].finish_reason
        running = client.completions.create(
            model="tiny", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(running))
        running.close()
    idle()


def test_its_own_bench_client_loses_no_request(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None]
) -> None:
    before = len(lines(*replicas))
    for replica in replicas:
        if hooked.kind == "sglang":
            command = [kit.KITS / "bench-sglang", replica.url, "--backend", "sglang-oai-chat"]
        else:
            command = [kit.KITS / "vllm" / "bench", replica.url, "--backend", "openai-chat"]
        flags = ["--num-prompts", "100", "--request-rate", "20"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=400)
        said = done.stdout + done.stderr
        assert re.findall(r"Successful requests:\s+(\d+)", said) == ["100"], said[-3000:]
    idle()
    placed = [line for line in lines(*replicas)[before:] if line["rank"]]
    assert len(placed) >= 200  # and what the clients ask first, to see that somebody answers
    assert {line["status"] for line in placed} == {200}
    ranks = Counter(line["rank"] for line in placed)
    assert min(ranks.values()) > 60, ranks


def test_an_engine_with_the_plugin_and_one_without_share_a_pool(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None], eventually: Eventually
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(kit.running(hooked.kind))
        plain = f"{url},kind={hooked.kind},dp={RANKS},name=plain"
        mixed = [hooked.serve(hooked.word, plain, stack=stack) for _ in range(2)]
        eventually(lambda: len(hooked.snapshot().ranks) == 2 * RANKS, "both engines are in the pool", within_s=30)
        streams = [stream(mixed[number % 2], LONG[hooked.kind]) for number in range(8)]
        eventually(
            lambda: 2 <= hooked.in_flight()[0] < 8, "the hook has acknowledged its own, and no others", within_s=30
        )
        for connection, answer in streams:
            assert answer.read().endswith(b"data: [DONE]\n\n")
            connection.close()
        placed = Counter(line["rank"] for line in lines(*mixed) if line["rank"])
        print(f"\n    {dict(sorted(placed.items()))}")
        assert set(placed) == {"hooked/0", "hooked/1", "plain/0", "plain/1"}, placed
        assert max(placed.values()) <= 3, placed
        assert 3 <= placed["hooked/0"] + placed["hooked/1"] <= 5, placed
        for number in range(40):
            status, _, body = mixed[number % 2].chat(max_tokens=4, n=1 + number % 2)
            assert status == 200, body
        idle()
        assert min(Counter(line["rank"] for line in lines(*mixed) if line["rank"]).values()) >= 2


def test_a_redis_that_loses_everything_loses_no_request(
    hooked: Hooked, replicas: list[Replica], idle: Callable[[], None]
) -> None:
    idle()
    admin = PoolAdmin(Settings(url=hooked._server.url, pool="p", budget_ms=2_000))
    admin.remove()
    began = time.monotonic()
    while time.monotonic() - began < 4:
        status, _, body = replicas[0].chat(max_tokens=2)
        assert status == 200, body
    idle()
    admin.close()
