"""What the tests of `balancer serve` share: engines in this process, replicas in their own, a pool to be left empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from balancer.embedded import EmbeddedRedis
from tests.serve.engine import Engine
from tests.serve.replica import Replica

Eventually = Callable[..., None]


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Make an engine: `engines(pace_s=0.01)`; all are closed when the test ends."""
    with ExitStack() as stack:
        yield lambda *args, **more: stack.enter_context(Engine(*args, **more))


@pytest.fixture
def serve(
    request: pytest.FixtureRequest, redis_server: EmbeddedRedis, client: redis.Redis, tmp_path: Path
) -> Iterator[Callable[..., Replica]]:
    """Start a replica: `serve("http://127.0.0.1:8000", "--option", "value")`; engines first, then options."""
    with ExitStack() as stack:

        def start(*words: str, files: tuple[int, int] | None = None, **env: str) -> Replica:
            engines = [word for word in words if word.startswith("http")]
            options = [word for word in words if not word.startswith("http")]
            log = tmp_path / f"replica-{len(list(tmp_path.iterdir()))}.log"
            return stack.enter_context(Replica(redis_server.url, engines, *options, log=log, files=files, **env))

        yield start
        for log in tmp_path.glob("replica-*.log") if request.config.getoption("capture") != "no" else ():
            print(f"--- {log.name}\n{log.read_text()[-6000:]}")  # pytest shows it where the test failed


@dataclass
class Standing:
    """One engine and one replica before it, for tests that need no options: a start costs more than a test."""

    engine: Engine
    replica: Replica
    client: redis.Redis


@pytest.fixture(scope="session")
def standing_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    log = tmp_path_factory.mktemp("serve") / "replica.log"
    with (
        EmbeddedRedis() as server,
        Engine() as engine,
        Replica(server.url, [engine.url], log=log) as replica,
        redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as client,
    ):
        yield Standing(engine, replica, client)


@pytest.fixture
def standing(standing_replica: Standing) -> Standing:
    """The standing replica, its engine well again and with nothing seen."""
    engine = standing_replica.engine
    engine.script, engine.pace_s, engine.left = engine.completes, 0.0, 0
    engine.seen.clear()
    assert standing_replica.replica.process.poll() is None, standing_replica.replica.log.read_text()[-3000:]
    return standing_replica


@pytest.fixture
def booked(client: redis.Redis) -> Callable[[], dict[str, Any]]:
    """What is in flight in the pool `p`: bookings, and the sums of tokens and requests over the ranks."""

    def look() -> dict[str, Any]:
        tokens = sum(int(value) for value in client.hvals("dpb:{p}:in_flight"))
        requests = sum(int(value) for value in client.hvals("dpb:{p}:in_flight_requests"))
        return {"bookings": client.hlen("dpb:{p}:bookings"), "tokens": tokens, "requests": requests}

    return look


@pytest.fixture
def nothing_booked(booked: Callable[[], dict[str, Any]], eventually: Eventually) -> Callable[[], None]:
    """Wait until nothing is in flight."""

    def wait() -> None:
        eventually(lambda: not any(booked().values()), "nothing is in flight", within_s=15)

    return wait
