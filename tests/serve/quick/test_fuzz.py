"""Mutated requests against a real replica for a bounded number of rounds; a failure prints the seed that replays it.

DP_BALANCER_FUZZ_SEED=123 DP_BALANCER_FUZZ_ROUNDS=5000 pytest tests/serve/quick/test_fuzz.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.serve.engine import Engine
from tests.serve.replica import Replica

ROUNDS = int(os.environ.get("DP_BALANCER_FUZZ_ROUNDS", "400"))
SEED = int(os.environ.get("DP_BALANCER_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
CHECK_EVERY = 50

BODIES = (
    b'{"model":"tiny","messages":[{"role":"user","content":"hello"}],"stream":true,"n":2}',
    b'{"prompt":[[1,2,3],[4]],"max_tokens":3,"rid":"abc"}',
    b'{"text":"x","sampling_params":{"n":2,"max_new_tokens":4},"stream":false}',
    b'{"input":[{"type":"message","role":"user","content":[{"type":"input_text","text":"a"}]}],"tools":[{}]}',
    b"{}",
)
PATHS = (
    b"/v1/chat/completions", b"/v1/completions", b"/generate", b"/v1/responses", b"/v1/messages", b"/v1/embeddings",
    b"/x",
)  # fmt: skip
HEADERS = (
    b"X-Request-Id: abc", b"Expect: 100-continue", b"Connection: keep-alive, x", b"Upgrade: websocket",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA",
    b"X: " + b"y" * 300, b"Transfer-Encoding: chunked", b"Content-Length: 5", b"Host: y", b"traceparent: 00-zz-11-01",
    b"Authorization: Bearer x",
)  # fmt: skip
TOKENS = (b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b":", b" ", b"\t", b"{", b"}", b"[", b'"', b"0", b"-1", b"9" * 30,
          b"HTTP/1.1", b"chunked", b"Content-Length: 1\r\n", b"\\ud800", b"1e999", b"NaN", b"/" * 50)  # fmt: skip


def request_from(rng: random.Random) -> bytes:
    """A request, perhaps sound, perhaps with a few bytes changed, cut short, or doubled."""
    body = rng.choice(BODIES)
    lines = [b"POST %b HTTP/1.1" % rng.choice(PATHS), b"Host: x", *rng.sample(HEADERS, rng.randrange(3))]
    if rng.random() < 0.2:
        lines.append(b"Transfer-Encoding: chunked")
        cut = rng.randrange(1, len(body) + 1)
        pieces = [piece for piece in (body[:cut], body[cut:]) if piece]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.randrange(1, 12)]
            case _:
                data[at:at] = data[max(0, at - 20) : at]
    return bytes(data)


def test_whatever_arrives_the_replica_lives_answers_others_and_has_nothing_booked_in_the_end(
    engines: Callable[..., Engine], serve: Callable[..., Replica], nothing_booked: Callable[[], None]
) -> None:
    engine = engines()
    replica = serve(f"{engine.url},kind=sglang,dp=2", "--read-timeout", "1", "--idle-timeout", "1")
    rng = random.Random(SEED)
    print(f"replay: DP_BALANCER_FUZZ_SEED={SEED} DP_BALANCER_FUZZ_ROUNDS={ROUNDS}")
    before_mib = 0.0
    for number in range(ROUNDS):
        with replica.raw() as raw:
            data = request_from(rng)
            pieces = rng.choice((1, 1, 2, 5))
            for start in range(0, len(data), step := -(-len(data) // pieces)):
                raw.send(data[start : start + step])
            if rng.random() < 0.5:
                raw.socket.settimeout(0.02)
                try:
                    seen = raw.socket.recv(65536)
                    assert seen == b"" or seen.startswith(b"HTTP/1.1 "), f"round {number}: {data!r} got {seen[:100]!r}"
                except (TimeoutError, ConnectionError):
                    pass
        if number % CHECK_EVERY == 0:
            assert replica.process.poll() is None, f"round {number}: the replica has died"
            assert replica.chat()[0] == 200, f"round {number}: others are not served"
            before_mib = before_mib or replica.rss_mib()
    assert "a defect" not in replica.log.read_text(), "an exception that nobody foresaw"
    assert replica.rss_mib() < before_mib + 30
    assert_sound(engine)
    nothing_booked()


def assert_sound(engine: Engine) -> None:
    """What reached the engine was one clear request each time (its reader raises otherwise), with one rank."""
    for exchange in engine.seen:
        assert exchange.target.startswith("/")
        ranks = [value for name, value in exchange.headers if name.lower() == "x-data-parallel-rank"]
        assert len(ranks) <= 1
        assert set(ranks) <= {"0", "1"}


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_makes_the_same_requests(seed: int) -> None:
    one, other = random.Random(seed), random.Random(seed)
    assert [request_from(one) for _ in range(50)] == [request_from(other) for _ in range(50)]
