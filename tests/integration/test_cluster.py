"""Cluster: the pool's node dies, and the pool's slot moves to another node, while requests are dispatched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import redis

from balancer.keys import pool_keys
from tests.crowd import crowd
from tests.integration.conftest import Figures, Up
from tests.integration.endure import BUDGET_MS, SLACK_MS, endure
from tests.integration.failover import bookings_through
from tests.integration.stack import POOL, Stack, wait_until

FAILOVER_MS = 15_000
SERVERS = ("redis", *(f"redis-{number}" for number in range(2, 7)))
URL = "redis+cluster://" + ",".join(f"{{{service}}}:6379" for service in SERVERS)


@pytest.fixture(scope="module")
def stack(up: Up) -> Iterator[Stack]:
    with up("cluster", "compose.cluster.yml", url=URL) as stack:
        yield stack


def primaries(stack: Stack) -> list[str]:
    return [service for service in SERVERS if stack.admin(service).info("replication")["role"] == "master"]


def is_whole(stack: Stack) -> bool:
    """Three primaries with a replica each, in step, and all of the same mind."""
    with contextlib.suppress(redis.RedisError):
        for service in SERVERS:
            admin = stack.admin(service)
            state = admin.execute_command("CLUSTER", "INFO")
            info = admin.info("replication")
            links = info["connected_slaves"] if info["role"] == "master" else int(info["master_link_status"] == "up")
            if b"cluster_state:ok" not in _raw(state) or not links:
                return False
        return len(primaries(stack)) == 3
    return False


def _raw(state: object) -> bytes:
    return state if isinstance(state, bytes) else "\n".join(f"{k}:{v}" for k, v in dict(state).items()).encode()  # type: ignore[call-overload]


def holder(stack: Stack) -> str:
    """The service that serves the pool."""
    wait_until(lambda: is_whole(stack), "the cluster is whole", within_s=40)
    key = pool_keys(POOL)[0]
    for service in primaries(stack):
        with contextlib.suppress(redis.ResponseError):
            stack.admin(service).hlen(key)
            return service
    raise AssertionError("nobody serves the pool")


def test_a_killed_node_costs_one_failover_and_no_request(stack: Stack, figures: Figures) -> None:
    before = holder(stack)
    endured = endure(stack, stack.killed(before), hold_s=7.0)
    figures("Cluster: the pool's node killed under load", str(endured))
    assert holder(stack) != before
    assert endured.sum("answers", "failed") == 0
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert 0 < endured.without_redis_ms <= FAILOVER_MS


def test_a_failover_doubles_no_booking(stack: Stack, figures: Figures) -> None:
    stack.configure(booking_lease_ms=60_000)
    bookings = bookings_through(stack, stack.killed(holder(stack)), hold_s=6.0)
    figures("Cluster: the pool's node killed while a dispatcher books without a pause", str(bookings))
    stack.configure()
    assert bookings.elsewhere == 0
    assert not bookings.mistakes, bookings.mistakes[:5]
    assert bookings.lost <= bookings.confirmed // 20


@contextlib.contextmanager
def moved_slot(stack: Stack, source: str, target: str) -> Iterator[None]:
    """The pool's slot, with its keys, goes from one primary to another, as `redis-cli --cluster reshard` does it."""
    admins = {service: stack.admin(service) for service in primaries(stack)}
    slot = admins[source].execute_command("CLUSTER", "KEYSLOT", pool_keys(POOL)[0])
    ids = {service: admin.execute_command("CLUSTER", "MYID").decode() for service, admin in admins.items()}
    admins[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    admins[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    host = stack.address(stack.container(target))
    auth = ("AUTH2", "admin", stack.password("admin"))
    while keys := admins[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 20):
        admins[source].execute_command("MIGRATE", host, 6379, "", 0, 5_000, *auth, "KEYS", *keys)
    for service in (target, source, *(other for other in admins if other not in (source, target))):
        admins[service].execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    yield


def test_a_slot_that_moves_is_followed(stack: Stack, figures: Figures) -> None:
    source = holder(stack)
    target = next(service for service in primaries(stack) if service != source)
    endured = endure(stack, moved_slot(stack, source, target), hold_s=1.5)
    figures("Cluster: the pool's slot moved to another node under load", str(endured))
    assert holder(stack) == target
    assert endured.sum("ends", "finished") == endured.asked
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.without_redis_ms <= 2_000 * crowd()
