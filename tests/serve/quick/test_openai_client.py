"""The `openai` package, as people use it, through a real replica: every kind of answer arrives whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import openai
import pytest
import redis

from tests.serve.conftest import Standing
from tests.serve.engine import Engine
from tests.serve.replica import Replica

MESSAGES = [{"role": "user", "content": "how is the weather in Zürich?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WORDS = "".join(f" w{number}" for number in range(20))


@pytest.fixture
def engine(standing: Standing) -> Engine:
    return standing.engine


@pytest.fixture
def replica(standing: Standing) -> Replica:
    return standing.replica


@pytest.fixture
def client(standing: Standing) -> redis.Redis:
    """The standing replica's Redis, which no test empties."""
    return standing.client


@pytest.fixture
def api(replica: Replica) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_chat_completion(api: openai.OpenAI, nothing_booked: Callable[[], None]) -> None:
    answer = api.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20)
    assert answer.choices[0].message.content == WORDS
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    nothing_booked()


def test_a_streamed_chat_completion_with_its_usage(api: openai.OpenAI, nothing_booked: Callable[[], None]) -> None:
    stream = api.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WORDS
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    nothing_booked()


def test_completions_streamed_and_not(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="tiny", prompt="once", max_tokens=20)
    pieces = api.completions.create(model="tiny", prompt="once", max_tokens=20, stream=True)
    assert whole.choices[0].text == WORDS == "".join(piece.choices[0].text for piece in pieces)


def test_tool_calls_whole_and_in_pieces(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    calls = whole.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "Zürich"}
    stream = api.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, stream=True)
    pieces = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].function.name == "weather"
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == {"city": "Zürich"}


def test_embeddings(api: openai.OpenAI) -> None:
    answer = api.embeddings.create(model="tiny", input="a text", encoding_format="float")
    assert answer.data[0].embedding == [0.5, -0.25]


def test_the_list_of_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]


def test_what_the_client_adds_reaches_the_engine_byte_for_byte(api: openai.OpenAI, engine: Engine) -> None:
    more = {"my_extra": {"kept": [1, 2.50, None]}, "min_p": 0.1}
    api.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=more, extra_headers={"X-Mine": "yes"})
    (seen,) = engine.seen
    assert seen.json["my_extra"] == more["my_extra"]
    assert seen.json["messages"] == MESSAGES
    assert seen.header("X-Mine") == "yes"


def test_an_error_of_the_engine_is_the_clients_to_read(api: openai.OpenAI, engine: Engine) -> None:
    async def refuses(exchange: object) -> None:
        await exchange.respond(400, {"error": {"message": "too long", "type": "BadRequest", "code": 400}})  # type: ignore[attr-defined]

    engine.script = refuses
    with pytest.raises(openai.BadRequestError, match="too long"):
        api.chat.completions.create(model="tiny", messages=MESSAGES)


def test_a_stream_cancelled_half_way_is_cancelled_at_the_engine(
    api: openai.OpenAI, engine: Engine, eventually: Callable[..., None], nothing_booked: Callable[[], None]
) -> None:
    engine.pace_s = 0.02
    stream = api.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5000, stream=True)
    for _, _ in zip(range(5), stream, strict=False):
        assert engine.open == 1
    stream.close()
    eventually(lambda: engine.left == 1 and engine.open == 0, "the engine's request is cancelled")
    nothing_booked()
    assert api.chat.completions.create(model="tiny", messages=MESSAGES).choices, "and the next one is served"


async def test_a_hundred_streams_at_once_lose_nothing(replica: Replica, nothing_booked: Callable[[], None]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0, timeout=60) as api:

        async def one() -> str:
            stream = await api.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(one() for _ in range(100)))
    assert set(answers) == {WORDS}
    nothing_booked()
