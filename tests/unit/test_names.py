"""Names are looked up within a time limit, whatever the system's resolver does."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from balancer.names import Names
from tests.crowd import crowd


class SlowResolver:
    """Answers when it is allowed to; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = threading.Event()

    def __call__(self, host: str) -> list[str]:
        self.asked += 1
        self.may_answer.wait(10)
        return [f"address of {host}"]


@pytest.mark.parametrize("host", ["10.0.0.1", "::1"])
def test_an_address_is_not_looked_up(host: str) -> None:
    def nobody(host: str) -> list[str]:
        raise AssertionError("was asked")

    assert Names(nobody).addresses(host, 0.0) == [host]


def test_a_name_has_its_addresses() -> None:
    assert set(Names().addresses("localhost", 5.0)) & {"127.0.0.1", "::1"}


def test_a_name_that_does_not_exist_is_an_error_and_asked_again() -> None:
    asked = []

    def nothing(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    names = Names(nothing)
    for _ in range(2):
        with pytest.raises(OSError, match="Name or service not known"):
            names.addresses("nowhere", 1.0)
    assert asked == ["nowhere", "nowhere"]


def test_whoever_asks_waits_no_longer_than_its_limit_and_all_share_one_look_up(
    eventually: Callable[[Callable[[], object], str], None],
) -> None:
    slow = SlowResolver()
    names = Names(slow)
    for _ in range(5):
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            names.addresses("far", 0.02)
        assert time.monotonic() - began_s < crowd()
    assert slow.asked == 1
    slow.may_answer.set()
    eventually(lambda: names.addresses("far", 1.0) == ["address of far"], "the name has an address")


def test_those_who_come_later_do_not_wait_for_a_look_up_that_takes_long() -> None:
    slow = SlowResolver()
    answers = iter([slow, lambda host: ["known again"]])
    names = Names(lambda host: next(answers)(host))
    with pytest.raises(TimeoutError):
        names.addresses("far", 0.6)
    assert names.addresses("far", 5.0) == ["known again"]
    slow.may_answer.set()


async def test_the_event_loop_goes_on_meanwhile() -> None:
    slow = SlowResolver()
    names = Names(slow)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await names.addresses_async("far", 0.02)
    assert slow.asked == 1
    slow.may_answer.set()
    assert await names.addresses_async("far", 5.0) == ["address of far"]


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_look_up() -> None:
    slow = SlowResolver()
    names = Names(slow)
    with pytest.raises(TimeoutError):
        names.addresses("far", 0.01)
    slow.may_answer.set()
    child = os.fork()
    if child == 0:
        os._exit(0 if names.addresses("far", 5.0) == ["address of far"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
