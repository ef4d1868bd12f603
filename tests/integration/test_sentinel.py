"""Sentinel: the primary goes, a replica takes over, dispatchers and engine follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crowd import crowd
from tests.integration.conftest import Figures, Up
from tests.integration.endure import BUDGET_MS, SLACK_MS, endure
from tests.integration.failover import bookings_through
from tests.integration.stack import Stack, wait_until
from tests.integration.test_acl import status

FAILOVER_MS = 15_000
URL = "redis+sentinel://{sentinel-1}:26379,{sentinel-2}:26379,{sentinel-3}:26379/dpb"
SERVERS = ("redis", "redis-2", "redis-3")


@pytest.fixture(scope="module")
def stack(up: Up) -> Iterator[Stack]:
    with up("sentinel", "compose.sentinel.yml", url=URL) as stack:
        yield stack


def role(stack: Stack, service: str) -> tuple[str, int]:
    """A server's role, and how many replicas follow it (or 1, where it follows a primary itself)."""
    info = stack.admin(service).info("replication")
    if info["role"] == "master":
        return "master", info["connected_slaves"]
    return "slave", int(info["master_link_status"] == "up")


def primary(stack: Stack) -> str:
    """The service that is the primary, once the other two follow it."""

    def settled() -> list[str]:
        roles = {service: role(stack, service) for service in SERVERS}
        followed = [service for service, (what, links) in roles.items() if what == "master" and links == 2]
        return followed if sum(what == "slave" for what, _ in roles.values()) == 2 else []

    wait_until(settled, "one primary with two replicas", within_s=40)
    return settled()[0]


def test_sentinels_tell_nobody_without_their_password(stack: Stack) -> None:
    for wrong in ("", "correct-horse-battery"):
        shown = status(stack, DP_BALANCER_SENTINEL_PASSWORD=wrong, DP_BALANCER_SENTINEL_PASSWORD_FILE="")
        assert shown.returncode not in (0, 1)
        assert "(sentinel sentinel-1:26379) refuses us" in shown.stderr
        assert stack.password("sentinels") not in shown.stdout + shown.stderr
        assert not wrong or wrong not in shown.stdout + shown.stderr
    assert status(stack).returncode in (0, 1)


def test_a_killed_primary_costs_one_failover_and_no_request(stack: Stack, figures: Figures) -> None:
    before = primary(stack)
    endured = endure(stack, stack.killed(before), hold_s=7.0)
    figures("Sentinel: primary killed under load", str(endured))
    assert primary(stack) != before
    assert endured.sum("answers", "failed") == 0
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert 0 < endured.without_redis_ms <= FAILOVER_MS


def test_a_paused_primary_that_wakes_up_is_not_written_to(stack: Stack, figures: Figures) -> None:
    before = primary(stack)
    endured = endure(stack, stack.paused(before), hold_s=7.0)
    figures("Sentinel: primary silent for 7 s under load, then awake again", str(endured))
    assert primary(stack) != before
    assert endured.sum("answers", "failed") == 0
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert 0 < endured.without_redis_ms <= FAILOVER_MS


def test_a_failover_doubles_no_booking(stack: Stack, figures: Figures) -> None:
    stack.configure(booking_lease_ms=60_000)
    before = primary(stack)
    bookings = bookings_through(stack, stack.killed(before), hold_s=5.0)
    figures("Sentinel: primary killed while a dispatcher books without a pause", str(bookings))
    stack.configure()
    assert bookings.elsewhere == 0
    assert not bookings.mistakes, bookings.mistakes[:5]
    assert bookings.lost <= bookings.confirmed // 20
