"""What a body tells about its prompt, and how many tokens are booked for it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from balancer import InvalidInput
from balancer.serve.endpoints import IMAGE_TOKENS, Asked, Malformed, check_width, is_placed, read_body
from balancer.serve.tokens import Estimate, TokenCounter

CHAT, COMPLETIONS, GENERATE = b"/v1/chat/completions", b"/v1/completions", b"/generate"


def asked_by(path: bytes, **fields: object) -> Asked:
    return read_body(path, json.dumps(fields).encode())


def tokens_of(path: bytes, **fields: object) -> tuple[int, str]:
    counted = TokenCounter().count(asked_by(path, **fields))
    return counted.tokens, counted.source


def test_a_post_to_an_endpoint_that_generates_is_placed_and_nothing_else() -> None:
    assert is_placed("POST", CHAT)
    assert not is_placed("GET", CHAT)
    assert not is_placed("POST", b"/v1/chat/completions/")
    assert not is_placed("POST", b"/v1/models")


@pytest.mark.parametrize(
    ("path", "fields", "tokens"),
    [
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 3),
        (COMPLETIONS, {"prompt": [[1, 2, 3], [4]]}, 4),
        (COMPLETIONS, {"prompt": [1, 2, 3], "n": 4}, 12),
        (b"/v1/embeddings", {"input": [[1, 2], [3, 4, 5]]}, 5),
        (GENERATE, {"input_ids": [7] * 90}, 90),
        (GENERATE, {"input_ids": [[7] * 10, [8] * 20], "sampling_params": {"n": 2}}, 60),
    ],
)
def test_token_ids_are_counted_exactly(path: bytes, fields: dict[str, object], tokens: int) -> None:
    assert tokens_of(path, **fields) == (tokens, "ids")


def test_text_is_estimated_at_four_bytes_a_token_at_first() -> None:
    assert tokens_of(COMPLETIONS, prompt="x" * 400) == (101, "estimate")
    assert tokens_of(COMPLETIONS, prompt="é" * 400)[0] == 201


def test_every_text_of_a_chat_counts_and_pictures_count_as_themselves() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    plain = tokens_of(CHAT, messages=[{"role": "user", "content": "y" * 400}])[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "y" * 400}, picture]}]
    assert tokens_of(CHAT, messages=parts)[0] == plain + IMAGE_TOKENS
    assert tokens_of(CHAT, messages=[{"role": "user", "content": "y" * 400}], tools=[{"d": "z" * 400}])[0] > plain + 90
    assert (
        tokens_of(b"/v1/messages", system="s" * 400, messages=[{"role": "user", "content": "y" * 400}])[0] > plain + 90
    )
    assert tokens_of(b"/v1/responses", input="y" * 400, instructions="s" * 400)[0] > 190


def test_a_request_books_at_least_one_token() -> None:
    assert tokens_of(CHAT)[0] == 1
    assert tokens_of(COMPLETIONS, prompt=[])[0] == 1


def test_what_fans_out_in_the_engine_is_known() -> None:
    assert not asked_by(COMPLETIONS, prompt="a").fans_out
    assert asked_by(COMPLETIONS, prompt="a", n=2).fans_out
    assert asked_by(COMPLETIONS, prompt=["a", "b"]).fans_out
    assert asked_by(COMPLETIONS, prompt=["a"]).fans_out
    assert asked_by(GENERATE, input_ids=[[1, 2]]).fans_out
    assert not asked_by(COMPLETIONS, prompt=[1, 2]).fans_out


def test_an_id_of_the_bodys_own_is_seen_and_used_only_where_it_can_stand_in_a_header() -> None:
    assert asked_by(GENERATE, text="a", rid="mine-1").rid == "mine-1"
    nasty = asked_by(GENERATE, text="a", rid="a\r\nX-Evil: 1")
    assert (nasty.rid, nasty.has_rid) == (None, True)
    assert asked_by(GENERATE, text=["a", "b"], rid=["x", "y"]).rid is None
    assert asked_by(b"/v1/responses", input="a", request_id="resp_1").rid == "resp_1"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"a":}', b"\xff\xfe", b"[" * 100_000, b'{"a":"\\ud800"}'])
def test_a_body_that_is_no_json_object_is_refused_without_being_quoted(body: bytes) -> None:
    with pytest.raises(Malformed) as error:
        read_body(CHAT, body)
    assert len(str(error.value)) < 120


DEEP = b"[" * 300 + b"]" * 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"tools":' + DEEP + b"}",
        b'{"tools":[%b],"temperature":NaN}' % (b"9" * 30),
        b'{"tools":["\\ud800"],"temperature":NaN}',
        b'\xef\xbb\xbf{"temperature":NaN}',
        '{"temperature":"乎乎","x":NaN}'.encode("utf-16-le").replace("乎乎".encode("utf-16-le"), b"NaN."),
    ],
    ids=["deep tools", "a huge number", "half a character", "a byte order mark", "UTF-16"],
)
def test_a_body_that_could_not_be_written_again_is_refused(body: bytes) -> None:
    for path in (CHAT, b"/v1/responses", b"/v1/messages"):
        with pytest.raises(Malformed):
            read_body(path, body)


@pytest.mark.parametrize("field", ["routed_dp_rank", "data_parallel_rank"])
def test_a_rank_of_the_clients_own_choice_is_refused_where_it_would_outdo_ours(field: str) -> None:
    with pytest.raises(Malformed, match=field):
        asked_by(GENERATE, text="a", **{field: 3})


def test_what_pythons_own_parser_takes_is_taken_too() -> None:
    assert read_body(COMPLETIONS, b'{"prompt":[1],"temperature":NaN}').ids == 1


def test_wrong_types_everywhere_are_the_engines_to_refuse() -> None:
    strange = {"messages": {"a": [1]}, "prompt": 5, "n": "x", "stream": "yes", "tools": 7, "system": [[None]], "rid": 1}
    for path in (CHAT, COMPLETIONS, GENERATE, b"/v1/messages", b"/v1/responses", b"/v1/embeddings"):
        assert TokenCounter().count(asked_by(path, **strange)).tokens >= 1


def test_the_estimate_settles_on_what_the_engine_counts() -> None:
    estimate = Estimate()
    for _ in range(400):
        estimate.learn(3000, 1000)
    assert estimate.bytes_per_token == pytest.approx(3, rel=0.01)
    assert estimate.tokens(3000) == pytest.approx(1000, rel=0.02)
    estimate.learn(10, 5000)  # a short prompt behind a long template teaches nothing
    assert estimate.bytes_per_token == pytest.approx(3, rel=0.01)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A small byte-level BPE of the real package, as tokenizer.json in `tmp_path`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["every rank steps together, the fullest sets the pace"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return made


async def test_a_tokenizer_counts_texts_exactly_and_what_is_no_text_by_its_rule(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "the fullest rank sets the pace, das hat niemand gewußt 你好"
    exactly = len(tokenizer.encode(text, add_special_tokens=False).ids)
    counter = TokenCounter(str(tmp_path))

    async def counted(path: bytes, **fields: object) -> tuple[int, str]:
        asked, counted = await counter.read(path, json.dumps(fields).encode())
        assert not asked.texts, "let go"
        return counted.tokens, counted.source

    try:
        assert exactly < len(text), "it is a tokenizer, not a list of letters"
        assert await counted(COMPLETIONS, prompt=text) == (exactly, "tokenizer")
        assert await counted(COMPLETIONS, prompt=[text, text], n=2) == (4 * exactly, "tokenizer")
        assert await counted(COMPLETIONS, prompt=text * 5000) == (
            len(tokenizer.encode(text * 5000, add_special_tokens=False).ids), "tokenizer",
        )  # fmt: skip
        assert await counted(COMPLETIONS, prompt=[1, 2]) == (2, "ids")
        chat = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        assert await counted(CHAT, messages=chat) == (2 * exactly + 2 * 4, "tokenizer"), "the template is not played"
    finally:
        counter.close()


async def test_half_a_character_is_no_text_for_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    counter = TokenCounter(str(tmp_path))
    try:
        with pytest.raises(Malformed):
            await counter.read(COMPLETIONS, b'{"prompt":"\\ud800","temperature":NaN}')
    finally:
        counter.close()


async def test_long_texts_are_counted_beside_the_event_loop(tokenizer: Tokenizer, tmp_path: Path) -> None:
    counter = TokenCounter(str(tmp_path / "tokenizer.json"))
    body = json.dumps({"prompt": "the fullest rank sets the pace, " * 20_000}).encode()
    turns = 0
    try:
        reading = asyncio.ensure_future(counter.read(COMPLETIONS, body))
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await reading)[1].tokens > 20_000
        assert turns > 10, "others had their turn"
    finally:
        counter.close()


MANY = 1 << 18


@pytest.mark.parametrize(
    "body",
    [
        b"{}," * MANY,
        b"[" * MANY,
        b'"a",' * MANY,
        b'{"a":1},' * MANY,
        b'"' * (4 * MANY),
        b"1," * (9 * MANY),
        b'"\\\\",' * MANY,
        b'"\\\\\\"",' * MANY,
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_parsed(body: bytes) -> None:
    with pytest.raises(Malformed, match="more than"):
        check_width(b'{"messages": [' + body + b"]}")


@pytest.mark.parametrize(
    "text", ['a[{"b": 1}], ' * MANY, "1,2,3," * (2 * MANY), "[" * MANY, "\\" * MANY + '"{' * MANY, "\\" * (MANY + 1)]
)
def test_a_long_text_is_one_part_whatever_stands_in_it(text: str) -> None:
    for shift in range(3):
        check_width(json.dumps({"x": "y" * shift, "prompt": text}).encode())


async def test_large_bodies_are_read_in_a_thread_and_small_ones_at_once() -> None:
    counter = TokenCounter()
    threads = []

    def reads() -> None:
        threads.append(threading.current_thread())

    try:
        await counter.beside(b" " * 1000, reads)
        await counter.beside(b" " * 200_000, reads)
        assert threads[0] is threading.main_thread()
        assert threads[1] is not threading.main_thread()
        large = json.dumps({"messages": [{"role": "user", "content": "x" * 400_000}]}).encode()
        asked, counted = await counter.read(CHAT, large)
        assert (asked.texts, counted.tokens) == (None, 100_000 + 4 + 1)
    finally:
        counter.close()


def test_a_tokenizer_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--tokenizer"):
        TokenCounter(str(tmp_path))
