"""The store answers within its budget whatever Redis does, and calls what went wrong by its name."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from balancer import InvalidInput, RankCounts, Request, Settings, StoreDenied, StoreError, StoreUnavailable, protocol
from balancer.blocking import BlockingClient, Line
from balancer.embedded import EmbeddedRedis
from balancer.model import Incarnation, Report
from balancer.store import AsyncStore, Store
from tests.crowd import crowd
from tests.either import Awaited
from tests.paths import open_many

BUDGET_MS = 400
PATIENT_MS = 10_000
"""Where the budget is not what the story is about."""
SLACK_S = 0.3
"""What two cores with ordinary company may add."""

MakeStore = Callable[..., Any]
JOIN = protocol.join("p", Incarnation("e", 2, "nonce"))


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to be stopped, killed and locked."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def plain(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as plain:
        yield plain


@pytest.fixture(params=["sync", "async"])
def store(request: pytest.FixtureRequest, server: EmbeddedRedis) -> Iterator[MakeStore]:
    """Make a store of either kind: `store(budget_ms=100)`."""
    made = []

    def make(url: str = server.url, budget_ms: int = BUDGET_MS, **more: Any) -> Any:
        settings = Settings(url=url, pool="p", budget_ms=budget_ms, **more)
        made.append(Store(settings) if request.param == "sync" else Awaited(AsyncStore(settings)))
        return made[-1]

    yield make
    for store in made:
        store.close()


@contextlib.contextmanager
def frozen(server: EmbeddedRedis) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def dispatch(request_id: str, tokens: int = 1) -> protocol.Operation[protocol.Dispatched]:
    return protocol.dispatch("p", "d", [Request(request_id, tokens)])


# -- the budget


def test_a_silent_redis_costs_one_budget(store: MakeStore, server: EmbeddedRedis) -> None:
    subject = store()
    subject.run(JOIN)
    with frozen(server):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"no answer from Redis at .* within {BUDGET_MS} ms"):
            subject.run(JOIN)
        assert BUDGET_MS / 1000 * 0.5 < time.monotonic() - began < BUDGET_MS / 1000 + SLACK_S * crowd()


def test_a_silent_redis_that_was_never_reached_costs_one_budget_too(store: MakeStore, server: EmbeddedRedis) -> None:
    with frozen(server):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store().run(JOIN)
        assert time.monotonic() - began < BUDGET_MS / 1000 + SLACK_S * crowd()


def test_a_dead_redis_is_tried_until_the_budget_is_spent_and_no_longer(store: MakeStore, server: EmbeddedRedis) -> None:
    subject = store()
    subject.run(JOIN)
    os.kill(server.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="is not available"):
        subject.run(JOIN)
    assert BUDGET_MS / 1000 * 0.5 < time.monotonic() - began < BUDGET_MS / 1000 + SLACK_S * crowd()


def test_a_redis_that_restarts_within_the_budget_goes_unnoticed(store: MakeStore, server: EmbeddedRedis) -> None:
    subject = store(budget_ms=20_000)
    subject.run(JOIN)
    server.stop()
    restart = threading.Thread(target=server.start)
    restart.start()
    try:
        assert subject.run(JOIN).epoch > 0
    finally:
        restart.join()


def test_a_redis_that_comes_back_later_is_used_by_the_same_store(store: MakeStore, server: EmbeddedRedis) -> None:
    subject = store()
    server.stop()
    with pytest.raises(StoreUnavailable):
        subject.run(JOIN)
    server.start()
    assert subject.run(JOIN).epoch > 0


def test_an_answer_that_comes_too_late_books_once(store: MakeStore, server: EmbeddedRedis, plain: redis.Redis) -> None:
    subject = store(budget_ms=4_000)  # four tries, one second each
    subject.run(JOIN)
    subject.run(dispatch("loads the script", 1))
    thaw = threading.Timer(1.5, os.kill, (server.pid, signal.SIGCONT))
    os.kill(server.pid, signal.SIGSTOP)
    thaw.start()
    answer = subject.run(dispatch("a", 10))
    thaw.join()
    assert answer.outcomes[0].outcome == "repeated", "the try that timed out was carried out all the same"
    assert sum(map(int, plain.hvals("dpb:{p}:in_flight"))) == 11


def test_a_script_is_not_run_again_by_the_driver_behind_our_back(
    store: MakeStore, server: EmbeddedRedis, plain: redis.Redis
) -> None:
    subject = store(budget_ms=400)
    subject.run(JOIN)
    plain.config_resetstat()
    with frozen(server), pytest.raises(StoreUnavailable):
        subject.run(dispatch("a"))
    calls = plain.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    assert calls <= 6  # a connection's time-out is a quarter of the budget


# -- who may


def test_a_missing_or_wrong_password_is_denied_at_once_and_the_right_one_is_not(
    store: MakeStore, server: EmbeddedRedis, plain: redis.Redis, tmp_path: Path
) -> None:
    plain.config_set("requirepass", "hunter2")
    for wrong in (None, "hunter3"):
        began = time.monotonic()
        with pytest.raises(StoreDenied, match="check user, password and ACL") as denied:
            store(budget_ms=PATIENT_MS, password=wrong).run(JOIN)
        assert time.monotonic() - began < 5, "nothing is gained by trying again"
        assert "hunter" not in str(denied.value)
    assert store(budget_ms=PATIENT_MS, password="hunter2").run(JOIN).epoch > 0
    assert store(url=server.url.replace("//", "//:hunter2@"), budget_ms=PATIENT_MS).run(JOIN).epoch > 0


def test_a_user_without_the_permission_is_denied(store: MakeStore, server: EmbeddedRedis, plain: redis.Redis) -> None:
    plain.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+get"])
    with pytest.raises(StoreDenied, match="permission"):
        store(username="reader", password="any", budget_ms=PATIENT_MS).run(JOIN)


def test_a_user_for_one_pool_may_use_no_other(store: MakeStore, server: EmbeddedRedis, plain: redis.Redis) -> None:
    plain.acl_setuser("p-only", enabled=True, nopass=True, keys=["dpb:{p}:*"], commands=["+@all"])
    subject = store(username="p-only", password="any", budget_ms=PATIENT_MS)
    assert subject.run(JOIN).epoch > 0
    with pytest.raises(StoreDenied):
        subject.run(protocol.join("q", Incarnation("e", 1, "n")))


# -- connections of threads


@pytest.fixture
def blocking(server: EmbeddedRedis) -> Iterator[Store]:
    store = Store(Settings(url=server.url, pool="p", budget_ms=BUDGET_MS))
    yield store
    store.close()


def opened(plain: redis.Redis) -> int:
    return int(plain.info("stats")["total_connections_received"])


def test_a_thread_keeps_its_connection_an_error_reply_included(blocking: Store, plain: redis.Redis) -> None:
    blocking.command("PING")
    before = opened(plain)
    for _ in range(10):
        blocking.run(JOIN)
        with pytest.raises(StoreError, match="wrong number of arguments"):
            blocking.command("GET")
    assert opened(plain) == before


def test_each_of_many_threads_has_a_connection_and_they_are_kept_for_the_next(
    server: EmbeddedRedis, plain: redis.Redis
) -> None:
    patient = Store(Settings(url=server.url, pool="p", budget_ms=60_000))
    before = opened(plain)
    open_many(patient, plain, 150)
    assert opened(plain) == before + 150
    patient.command("PING")
    assert opened(plain) == before + 150
    patient.close()


def test_a_connection_that_the_server_closed_meanwhile_costs_no_try(blocking: Store, plain: redis.Redis) -> None:
    blocking.command("PING")
    plain.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert blocking.command("PING")


def test_a_store_that_nobody_holds_any_more_leaves_no_connection_behind(
    server: EmbeddedRedis, plain: redis.Redis, eventually: Callable[..., None]
) -> None:
    """At once, an error reply before it included: a collection may be far, and engines put it off."""
    before = int(plain.info("clients")["connected_clients"])
    gc.disable()
    try:
        store = Store(Settings(url=server.url, pool="p", budget_ms=PATIENT_MS))
        store.run(JOIN)  # the script is not known yet
        del store
        eventually(lambda: int(plain.info("clients")["connected_clients"]) == before, "its connection is closed")
    finally:
        gc.enable()


def test_the_connections_of_one_that_is_part_of_a_circle_are_closed_before_it_is_collected() -> None:
    """Or a socket may be found before its owner, and what is told then is a leak (ResourceWarning)."""
    ours, theirs = socket.socketpair()
    closed = []

    def close() -> None:
        closed.append(ours.fileno() >= 0)
        ours.close()

    with theirs:
        client = BlockingClient(lambda until_s: Line(ours, Exception, close), lambda error: False)
        theirs.sendall(b"+PONG\r\n")
        assert client.execute_command("PING", until_s=time.monotonic() + 1) == b"PONG"
        client.circle = client  # type: ignore[attr-defined]
        del client
        gc.collect()
    assert closed == [True]


def test_a_reply_that_came_too_late_is_nobodys(blocking: Store, server: EmbeddedRedis) -> None:
    blocking.command("PING")
    with frozen(server), pytest.raises(StoreUnavailable):
        blocking.command("ECHO", "too late")
    assert blocking.command("ECHO", "in time") == b"in time"


def test_an_address_that_is_none_is_refused_before_anything_is_tried(store: MakeStore) -> None:
    for url in ("localhost", "http://localhost", "redis://localhost:99999"):
        with pytest.raises(InvalidInput, match="Redis address"):
            store(url=url)


# -- not now


def test_a_full_redis_is_unavailable_and_nothing_is_half_written(
    store: MakeStore, server: EmbeddedRedis, plain: redis.Redis
) -> None:
    subject = store(budget_ms=1_000)
    joined = subject.run(JOIN)
    subject.run(dispatch("a", 10))
    before = {key: plain.hgetall(key) for key in plain.scan_iter("dpb:*", _type="hash")}
    plain.config_set("maxmemory", "1")
    for operation in (dispatch("b"), protocol.report("p", joined, Report(1, [RankCounts(1, 1)] * 2))):
        with pytest.raises(StoreUnavailable, match="is not available"):
            subject.run(operation)
    assert {key: plain.hgetall(key) for key in plain.scan_iter("dpb:*", _type="hash")} == before
    plain.config_set("maxmemory", "0")
    assert subject.run(dispatch("b")).outcomes[0].outcome == "placed"


def test_a_replica_is_unavailable_for_writing(store: MakeStore, server: EmbeddedRedis, plain: redis.Redis) -> None:
    subject = store(budget_ms=1_000)
    subject.run(JOIN)
    plain.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="is not available"):
        subject.run(dispatch("a"))
    plain.execute_command("REPLICAOF", "NO", "ONE")
    assert subject.run(dispatch("a")).outcomes


def test_a_redis_busy_with_somebodys_script_is_unavailable(
    store: MakeStore, server: EmbeddedRedis, plain: redis.Redis, eventually: Callable[..., None]
) -> None:
    subject = store(budget_ms=200)
    subject.run(JOIN)
    plain.config_set("lua-time-limit", "1")

    def hog() -> None:
        with redis.Redis.from_url(server.url) as client, contextlib.suppress(redis.ResponseError):
            client.eval("while true do end", 0)

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        eventually(lambda: _is_busy(plain), "the script hogs the server")
        with pytest.raises(StoreUnavailable):
            subject.run(dispatch("a"))
    finally:
        plain.script_kill()
        thread.join()
    assert subject.run(dispatch("a")).outcomes


def _is_busy(plain: redis.Redis) -> bool:
    try:
        plain.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False
