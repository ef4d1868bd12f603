"""The way to Redis changes under a store: names move, paths die without a word, sentinels err, each step is slow."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from balancer import AsyncDispatcher, Dispatcher, NoRank, Settings, StoreUnavailable, connection, protocol
from balancer.embedded import EmbeddedRedis
from balancer.model import Incarnation
from balancer.names import Names
from balancer.store import AsyncStore, Store
from tests.either import Awaited
from tests.paths import Listener, named, open_many

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


def url_of(*ports: int, scheme: str = "redis", path: str = "") -> str:
    return f"{scheme}://" + ",".join(f"127.0.0.1:{port}" for port in ports) + path


# -- the primary moves


def test_a_name_that_leads_to_a_new_primary_is_followed_though_the_old_one_lives_on_as_a_replica(
    store: MakeStore, eventually: Eventually
) -> None:
    with EmbeddedRedis() as old, EmbeddedRedis() as new, named(old.port) as name:
        subject = store(url_of(name.port), budget_ms=10_000)
        subject.run(protocol.configure("p", {"engine_lease_ms": 600_000}))
        subject.run(JOIN)
        with redis.Redis.from_url(old.url) as old_client, redis.Redis.from_url(new.url) as new_client:
            old_client.config_set("repl-diskless-sync-delay", 0)
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
        subject = store(server.url)
        dispatch = protocol.dispatch("p", "d", [protocol.Request("a", 1)])
        assert not subject.run(dispatch).knows_pool
        with redis.Redis.from_url(server.url) as client:
            client.replicaof("127.0.0.1", 1)
            with pytest.raises(StoreUnavailable):
                subject.run(dispatch)
            client.replicaof("NO", "ONE")
        assert not subject.run(dispatch).knows_pool


class Sentinel(Listener):
    """One that names `primary`, or says nothing where there is none: stopped, or behind a path that has died."""

    def __init__(self, primary: int | None) -> None:
        self._primary = primary
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        while connection.recv(65_536):
            if self._primary is not None:
                port = str(self._primary)
                connection.sendall(f"*2\r\n$9\r\n127.0.0.1\r\n${len(port)}\r\n{port}\r\n".encode())


@pytest.mark.parametrize("tries", [1, 4])
def test_a_sentinel_that_says_nothing_makes_way_for_the_next_however_few_the_tries(
    store: MakeStore, redis_server: EmbeddedRedis, client: redis.Redis, tries: int
) -> None:
    with closing(Sentinel(None)) as silent, closing(Sentinel(redis_server.port)) as good:
        subject = store(url_of(silent.port, good.port, scheme="redis+sentinel", path="/m"), 1_500 * tries, tries=tries)
        if tries == 1:
            with pytest.raises(StoreUnavailable):
                subject.run(JOIN)
        assert subject.run(JOIN).epoch > 0


def test_a_sentinel_that_is_cut_off_and_names_a_primary_of_the_past_makes_way_for_the_next(
    store: MakeStore, redis_server: EmbeddedRedis, client: redis.Redis
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        past = gone.getsockname()[1]
    with closing(Sentinel(past)) as cut_off, closing(Sentinel(redis_server.port)) as good:
        subject = store(url_of(cut_off.port, good.port, scheme="redis+sentinel", path="/m"), budget_ms=6_000)
        assert subject.run(JOIN).epoch > 0


# -- paths die


def test_threads_whose_paths_have_died_unsaid_lose_one_try_between_them_and_not_one_per_idle_connection(
    redis_server: EmbeddedRedis, client: redis.Redis
) -> None:
    with named(redis_server.port) as name:
        subject = Store(Settings(url=url_of(name.port), pool="p", budget_ms=4_000, tries=4))
        open_many(subject, client, 8)
        name.lose_open_paths()
        assert subject.run(JOIN).epoch > 0, "the second of four tries opens a new connection"
        subject.close()


# -- each step is slow


class SlowNode(Listener):
    """A Redis that takes `step_s` for each reply, to the password as to a script, which it does not know."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        while data := connection.recv(65_536):
            time.sleep(self._step_s)
            connection.sendall(b"-NOSCRIPT no\r\n" if b"EVALSHA" in data else b"+OK\r\n")


@pytest.mark.parametrize("tries", [1, 4])
def test_what_a_connection_takes_to_open_is_part_of_the_budget(store: MakeStore, tries: int) -> None:
    """Four steps, each within the time of a try: password, database, script, script once more."""
    with closing(SlowNode(0.35)) as node:
        subject = store(f"redis://user:secret@127.0.0.1:{node.port}/1", budget_ms=400, tries=tries)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="within 400 ms"):
            subject.run(JOIN)
        assert time.monotonic() - began < 0.4 + SLACK_S


def test_a_connection_that_takes_longer_than_a_budget_is_there_for_the_next_operation(
    store: MakeStore, redis_server: EmbeddedRedis, client: redis.Redis, eventually: Eventually
) -> None:
    """Otherwise a small budget and a password would keep a dispatcher from Redis for ever."""
    client.acl_setuser("slow", enabled=True, passwords="+secret", keys=["*"], commands=["+@all"])
    with closing(Store(Settings(url=redis_server.url, pool="p", budget_ms=10_000))) as quick:
        quick.run(JOIN)  # so that Redis knows the script
    with named(redis_server.port, delay_s=0.4) as name:
        subject = store(f"redis://slow:secret@127.0.0.1:{name.port}/1", budget_ms=700, tries=1)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="within 700 ms"):
            subject.run(JOIN)
        assert time.monotonic() - began < 0.7 + SLACK_S

        def is_there() -> bool:
            with contextlib.suppress(StoreUnavailable):
                return bool(subject.run(JOIN).epoch > 0)
            return False

        eventually(is_there, "the connection that the first operation has begun to open is open", within_s=20)
    client.acl_deluser("slow")
    client.flushall()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_name_whose_look_up_takes_longer_than_a_budget_is_there_for_the_next_probe(
    kind: str, redis_server: EmbeddedRedis, client: redis.Redis, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is not remembered, so it must be waited for."""

    def look(host: str) -> list[str]:
        time.sleep(0.5)
        return ["127.0.0.1"]

    monkeypatch.setattr(connection, "_names", Names(look))
    with closing(Store(Settings(url=redis_server.url, pool="p", budget_ms=10_000))) as quick:
        quick.run(JOIN)
        quick.run(protocol.dispatch("p", "d", [protocol.Request("a", 1)]))  # so that Redis knows the script
    settings = Settings(f"redis://far:{redis_server.port}", pool="p", budget_ms=200, tries=1, probe_ms=900)
    dispatcher: Any = Dispatcher(settings) if kind == "sync" else Awaited(AsyncDispatcher(settings))

    def is_placed() -> bool:
        try:
            return bool(dispatcher.dispatch("a", 1).outcome == "repeated")
        except NoRank:  # it has never seen a rank to fall back to
            return False

    assert not is_placed()
    eventually(is_placed, "Redis places")
    dispatcher.close()


def test_an_address_that_leads_nowhere_makes_way_for_the_next_of_the_same_name(
    store: MakeStore, redis_server: EmbeddedRedis, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_names", Names(lambda host: ["127.0.0.2", "127.0.0.1"]))
    with contextlib.ExitStack() as full:  # a system that takes no more connections does not say so
        full.enter_context(socket.create_server(("127.0.0.2", redis_server.port), backlog=0))
        for _ in range(2):
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", redis_server.port))
        subject = store(f"redis://two:{redis_server.port}", budget_ms=2_000)
        assert subject.run(JOIN).epoch > 0


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_dispatch_and_the_release_of_what_an_outage_has_left_have_one_budget(
    kind: str, redis_server: EmbeddedRedis, client: redis.Redis, eventually: Eventually
) -> None:
    with closing(Store(Settings(url=redis_server.url, pool="p", budget_ms=10_000))) as quick:
        quick.run(protocol.configure("p", {"engine_lease_ms": 600_000}))
        quick.run(JOIN)
    with named(redis_server.port) as name:
        settings = Settings(url=url_of(name.port), pool="p", budget_ms=1_000, tries=1, probe_ms=50)
        dispatcher: Any = Dispatcher(settings) if kind == "sync" else Awaited(AsyncDispatcher(settings))
        eventually(lambda: dispatcher.dispatch("first", 1).outcome == "repeated", "Redis places, and is known to")
        name.lose_open_paths()
        assert dispatcher.dispatch("owed", 1).outcome == "fallback"
        eventually(lambda: dispatcher.dispatch("second", 1).outcome == "repeated", "Redis places again")
        time.sleep(2.5)  # the aftermath of an outage: by its end engines have counted what they received
        name.delay_s = 0.9
        began = time.monotonic()
        assert dispatcher.dispatch("third", 1).outcome == "fallback", "the release has taken nearly all of it"
        assert time.monotonic() - began < 1.0 + SLACK_S
        dispatcher.close()
