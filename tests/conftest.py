"""What all tests share: one real Redis for the run, a clean pool for each test, and waiting for conditions.

Where CI=true a test that is left out is a failure: nobody reads there that a trace or a program was missing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import pytest
import redis

from balancer import Dispatcher, Reporter, Settings
from balancer.admin import PoolAdmin
from balancer.embedded import EmbeddedRedis
from balancer.protocol import Operation
from balancer.store import Store
from tests.clock import CLOCK_KEY, Clock, script_with_test_clock

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _failed_if_left_out(report: Report) -> Report:
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"left out, which in CI is a failure: {reason}"
    return report


def pytest_configure() -> None:
    """What a shell puts in the background may ignore SIGINT, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test."""
    return _failed_if_left_out((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file of tests."""
    return _failed_if_left_out((yield))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def client(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A plain client on an empty server: what `redis-cli` would see."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True, protocol=2) as plain:
        plain.flushall()
        yield plain
        leaked = [key for key in plain.scan_iter("*") if not key.startswith("dpb:{")]
        assert not leaked, f"keys outside the project's prefix: {leaked}"
        for key in plain.scan_iter("dpb:{*}:*"):
            if not key.endswith(":pool"):
                assert plain.pttl(key) > 0, f"{key} never ends"


@pytest.fixture
def settings(redis_server: EmbeddedRedis, client: redis.Redis) -> Settings:
    """Settings of a dispatcher or reporter on the pool `p`; the budget leaves room for a crowded machine."""
    return Settings(url=redis_server.url, pool="p", budget_ms=2_000)


@pytest.fixture
def dispatcher(settings: Settings) -> Iterator[Dispatcher]:
    """A dispatcher of the pool `p`."""
    with Dispatcher(settings) as dispatcher:
        yield dispatcher


@pytest.fixture
def join(settings: Settings) -> Iterator[Callable[..., Reporter]]:
    """Join an engine: `join("e0", 4, capacity_tokens=100)`; closed when the test ends."""
    reporters: list[Reporter] = []

    def begin(engine: str, size: int = 1, **more: Any) -> Reporter:
        reporters.append(Reporter(settings, engine, size, **more))
        reporters[-1].join()
        return reporters[-1]

    yield begin
    for reporter in reporters:
        reporter.close()


@pytest.fixture
def run(settings: Settings) -> Iterator[Callable[[Operation[Any]], Any]]:
    """Perform one operation of `balancer.protocol`."""
    store = Store(settings)
    yield store.run
    store.close()


@pytest.fixture
def admin(settings: Settings) -> Iterator[PoolAdmin]:
    """The operator of the pool `p`."""
    admin = PoolAdmin(settings)
    yield admin
    admin.close()


@pytest.fixture
def clock(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The scripts' clock, in the test's hand."""
    monkeypatch.setattr("balancer.store.load_script", script_with_test_clock)
    yield Clock(client)
    client.delete(CLOCK_KEY)


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """Wait until a condition holds: `eventually(lambda: x == 1, "x becomes 1")`."""

    def wait(condition: Callable[[], object], what: str, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
            time.sleep(0.005)

    return wait
