"""A front door with a certificate: who comes through it is served, and who does not holds nothing up."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.engine import Engine, Exchange
from tests.serve.replica import Replica

Engines = Callable[..., Engine]
Serve = Callable[..., Replica]
Wait = Callable[[], None]


@pytest.fixture
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options that name a certificate for this address, made for the test, and its key."""
    folder: Path = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([*make.split(), *more], check=True, capture_output=True)
    return "--tls-cert", cert, "--tls-key", key


def test_who_trusts_the_certificate_is_served(
    engines: Engines, serve: Serve, certificate: tuple[str, ...], nothing_booked: Wait
) -> None:
    replica = serve(engines().url, *certificate)
    assert replica.chat()[0] == 200
    assert replica.chat(stream=True)[2].endswith(b"data: [DONE]\n\n")
    nothing_booked()


def test_connections_that_never_shake_hands_end_soon(
    engines: Engines, serve: Serve, certificate: tuple[str, ...]
) -> None:
    """Before that nobody counts them, `--max-connections` neither."""
    replica = serve(engines().url, *certificate)
    began = time.monotonic()
    crowd = [replica.raw() for _ in range(100)]
    assert replica.chat()[0] == 200, "others are served meanwhile"
    assert [raw.all(timeout_s=30) for raw in crowd] == [b""] * 100
    assert time.monotonic() - began < 15
    for raw in crowd:
        raw.close()


def test_an_answer_that_is_read_late_arrives_whole_though_it_is_its_connections_last(
    engines: Engines, serve: Serve, certificate: tuple[str, ...]
) -> None:
    """Of some sizes the kernel takes the most part, and what is left waits here while the connection closes."""
    sizes = range(2_000_000, 5_000_000, 250_000)

    async def pours(exchange: Exchange) -> None:
        size = exchange.json["max_tokens"]
        await exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))

    replica = serve(engines(pours).url, *certificate)
    crowd = [replica.connect() for _ in sizes]
    for connection, size in zip(crowd, sizes, strict=True):
        body = json.dumps({"messages": [], "max_tokens": size})
        connection.request("POST", "/v1/chat/completions", body, {"Connection": "close"})
    time.sleep(4)
    assert [len(connection.getresponse().read()) for connection in crowd] == list(sizes)


def test_an_idle_client_that_does_not_read_does_not_hold_up_the_end(
    engines: Engines, serve: Serve, certificate: tuple[str, ...]
) -> None:
    """TLS ends with a word from both sides, and a client that waits for nothing says none."""
    replica = serve(engines().url, *certificate)
    connection = replica.connect()
    connection.request("GET", "/healthz")
    assert connection.getresponse().read()
    replica.terminate()
    assert replica.process.wait(10) == 0
    connection.close()
