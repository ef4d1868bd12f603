"""The way to Redis changes under a store: names move, paths die without a word, sentinels err, each step is slow."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from balancer import RankCounts, Reporter, Settings, StoreUnavailable, protocol
from balancer.embedded import EmbeddedRedis
from balancer.model import Incarnation
from balancer.store import AsyncStore, Store
from tests.either import Awaited

SLACK_S = 0.3
"""What two crowded cores may add."""

Eventually = Callable[..., None]
MakeStore = Callable[..., Any]
JOIN = protocol.join("p", Incarnation("e", 2, "nonce"))


@pytest.fixture(params=["sync", "async"])
def store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Make a store of either kind: `store(url, budget_ms=100)`."""
    made = []

    def make(url: str, budget_ms: int = 1_000, **more: Any) -> Any:
        settings = Settings(url=url, pool="p", budget_ms=budget_ms, **more)
        made.append(Store(settings) if request.param == "sync" else Awaited(AsyncStore(settings)))
        return made[-1]

    yield make
    for store in made:
        store.close()


class Listener:
    """A port of this machine; each connection is served by a thread."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._taken: list[socket.socket] = []
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for each in (self._socket, *self._taken):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._taken.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(connection)


class Name(Listener):
    """A name, or a virtual address: it leads new connections to `target`; those that are open stay where they are."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.connections = 0
        self._dead_until = 0
        super().__init__()

    def lose_open_paths(self) -> None:
        """What is open now delivers nothing any more, and nobody is told."""
        self._dead_until = self.connections

    def serve(self, connection: socket.socket) -> None:
        self.connections += 1
        number = self.connections
        beyond = socket.create_connection(("127.0.0.1", self.target))
        self._taken.append(beyond)
        threading.Thread(target=self._pass, args=(beyond, connection, number), daemon=True).start()
        self._pass(connection, beyond, number)

    def _pass(self, source: socket.socket, sink: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if number > self._dead_until:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def named(target: int) -> Iterator[Name]:
    with contextlib.closing(Name(target)) as name:
        yield name


def url_of(*ports: int, scheme: str = "redis", path: str = "") -> str:
    return f"{scheme}://" + ",".join(f"127.0.0.1:{port}" for port in ports) + path


# -- the primary moves


def test_a_name_that_leads_to_a_new_primary_is_followed_though_the_old_one_lives_on_as_a_replica(
    store: MakeStore, eventually: Eventually
) -> None:
    with EmbeddedRedis() as old, EmbeddedRedis() as new, named(old.port) as name:
        subject = store(url_of(name.port))
        subject.run(JOIN)
        with redis.Redis.from_url(old.url) as old_client, redis.Redis.from_url(new.url) as new_client:
            new_client.replicaof("127.0.0.1", old.port)
            eventually(lambda: new_client.info("replication")["master_link_status"] == "up", "the new one has it all")
            new_client.replicaof("NO", "ONE")
            name.target = new.port
            old_client.replicaof("127.0.0.1", new.port)
        placed = subject.run(protocol.dispatch("p", "d", [protocol.Request("a", 1)]))
        assert placed.outcomes[0].outcome == "placed", "by the new one, in the same operation"


def test_a_demoted_server_without_data_is_not_taken_for_an_empty_pool(store: MakeStore) -> None:
    """The path that finds no pool writes nothing else, so a replica would answer it."""
    with EmbeddedRedis() as server:
        subject = store(server.url, budget_ms=200)
        dispatch = protocol.dispatch("p", "d", [protocol.Request("a", 1)])
        assert not subject.run(dispatch).knows_pool
        with redis.Redis.from_url(server.url) as client:
            client.replicaof("127.0.0.1", 1)
            with pytest.raises(StoreUnavailable, match="is not available"):
                subject.run(dispatch)
            client.replicaof("NO", "ONE")
        assert not subject.run(dispatch).knows_pool


# -- paths die


def test_threads_whose_paths_have_died_unsaid_lose_one_try_between_them_and_not_one_per_idle_connection(
    redis_server: EmbeddedRedis, client: redis.Redis
) -> None:
    with named(redis_server.port) as name:
        subject = Store(Settings(url=url_of(name.port), pool="p", budget_ms=4_000, tries=4))
        threads = [threading.Thread(target=subject.command, args=("BLPOP", f"gate-{at}", "5")) for at in range(8)]
        for thread in threads:
            thread.start()
        while int(client.info("clients")["blocked_clients"]) < len(threads):
            time.sleep(0.005)
        for at in range(len(threads)):
            client.rpush(f"gate-{at}", "open")
        for thread in threads:
            thread.join()
        name.lose_open_paths()
        assert subject.run(JOIN).epoch > 0, "the second of four tries opens a new connection"
        subject.close()
