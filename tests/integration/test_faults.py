"""What befalls a running system, one fault at a time, under load; figures are printed (`make test-docker`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.crowd import crowd
from tests.integration.conftest import Figures
from tests.integration.endure import BUDGET_MS, SLACK_MS, endure
from tests.integration.stack import ENGINE_LEASE_MS, Stack, docker, wait_until

HOLD_S = 3.0
PROBE_MS = 500
"""How often a dispatcher tries Redis while it is away."""
BACK_MS = PROBE_MS + 1_500
"""By when a dispatcher is to have Redis again, two crowded cores allowed for."""
FEW = 0.1
"""Share of requests that crowded cores may make a dispatcher fall back for: one late answer is 15 of them, until its
next probe."""
SETTLED_S = 4.0
"""By when after a fault dispatchers that are asked have released what was booked without their knowing."""


@contextmanager
def restarted(stack: Stack, with_data: bool) -> Iterator[None]:
    """Redis is killed and comes back, with its data or without."""
    if not with_data:  # what a disk that was lost looks like, without taking the users' file along
        stack.admin().config_set("appendonly", "no")
    docker("kill", stack.container("redis"))
    if not with_data:
        stack.compose("run --rm --no-deps -T --user root --entrypoint sh redis -c 'rm -rf /data/*'")
    try:
        yield
    finally:
        docker("start", stack.container("redis"))
        wait_until(lambda: _answers(stack), "Redis answers")
        if not with_data:
            stack.configure()


def _answers(stack: Stack) -> bool:
    try:
        return bool(stack.admin().ping())
    except Exception:  # whatever a server that is starting says
        return False


@pytest.mark.parametrize("with_data", [True, False], ids=["with its data", "without its data"])
def test_a_restarted_redis_costs_its_absence_and_no_request(plain: Stack, figures: Figures, with_data: bool) -> None:
    endured = endure(plain, restarted(plain, with_data), HOLD_S, after_s=3.0)
    figures(f"Redis killed, {HOLD_S:g} s away, back {'with' if with_data else 'without'} its data", str(endured))
    # Back after the engine's lease, or empty, Redis knows of no engine until its next report; nobody is refused for it.
    assert endured.sum("ends", "finished") == endured.asked
    assert endured.sum("answers", "fallback") > 0
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.recovery_ms <= BACK_MS * crowd()


def test_a_paused_redis_costs_one_budget_per_probe(plain: Stack, figures: Figures) -> None:
    endured = endure(plain, plain.paused("redis"), HOLD_S)
    figures(f"Redis paused for {HOLD_S:g} s", str(endured))
    assert endured.sum("ends", "finished") == endured.asked
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.recovery_ms <= BACK_MS * crowd()


@pytest.mark.parametrize(
    "chains", [("INPUT", "OUTPUT"), ("INPUT",), ("OUTPUT",)], ids=["both ways", "answers", "questions"]
)
def test_a_dispatcher_cut_off_falls_back_and_the_others_do_not(
    plain: Stack, figures: Figures, chains: tuple[str, ...]
) -> None:
    cut_off = plain.dispatchers[0]
    endured = endure(plain, plain.cut(cut_off, plain.container("redis"), *chains), HOLD_S, SETTLED_S)
    way = {1: f"{chains[0].lower()} only", 2: "both ways"}[len(chains)]
    figures(f"One dispatcher cut off from Redis for {HOLD_S:g} s, {way}", str(endured))
    first, *others = endured.counted
    assert first["answers"]["fallback"] > 0
    assert all(one["answers"].get("fallback", 0) <= FEW * one["asked"] for one in others)
    assert endured.sum("ends", "finished") == endured.asked
    assert endured.expired == 0, "what was booked without the dispatcher's knowing has been released"
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.recovery_ms <= BACK_MS * crowd()


@pytest.mark.parametrize(
    "chains", [("INPUT", "OUTPUT"), ("INPUT",), ("OUTPUT",)], ids=["both ways", "answers", "questions"]
)
def test_an_engine_cut_off_from_redis_is_believed_for_its_lease(
    plain: Stack, figures: Figures, chains: tuple[str, ...]
) -> None:
    hold_s = ENGINE_LEASE_MS / 1000 + 2
    endured = endure(
        plain, plain.cut(plain.container("engine"), plain.container("redis"), *chains), hold_s, after_s=3.0
    )
    way = {1: f"{chains[0].lower()} only", 2: "both ways"}[len(chains)]
    figures(f"The engine cut off from Redis for {hold_s:g} s, {way} (lease {ENGINE_LEASE_MS / 1000:g} s)", str(endured))
    # Its lease over, the pool says so; the engine goes on with what it has, and reports it when it can again.
    assert endured.sum("no_rank", "all_silent") == endured.asked - endured.sum("ends", "finished") > 0
    assert endured.sum("answers", "fallback") <= FEW * endured.asked


def test_redis_without_a_network_costs_its_absence_and_no_request(plain: Stack, figures: Figures) -> None:
    endured = endure(plain, plain.disconnected("redis"), HOLD_S, SETTLED_S)
    figures(f"Redis without its network for {HOLD_S:g} s (engine and all dispatchers)", str(endured))
    assert endured.sum("ends", "finished") == endured.asked
    assert endured.expired == 0, "what was booked without a dispatcher's knowing has been released"
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.recovery_ms <= BACK_MS * crowd()


@contextmanager
def memory_full(stack: Stack) -> Iterator[None]:
    """Nothing more may be written; what is there may be taken away."""
    before = stack.admin().config_get("maxmemory")["maxmemory"]
    stack.admin().config_set("maxmemory", "1mb")
    try:
        yield
    finally:
        stack.admin().config_set("maxmemory", before)


def test_a_full_redis_is_an_outage_that_says_so(plain: Stack, figures: Figures) -> None:
    endured = endure(plain, memory_full(plain), HOLD_S, after_s=3.0)
    figures(f"Redis' memory full for {HOLD_S:g} s (noeviction)", str(endured))
    assert "maxmemory" in endured.logs
    assert endured.sum("answers", "failed") == 0
    assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    assert endured.recovery_ms <= BACK_MS * crowd()


@contextmanager
def read_only(stack: Stack) -> Iterator[None]:
    """The server that everybody talks to has become a replica, as an old primary does after a failover."""
    stack.admin().execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        stack.admin().execute_command("REPLICAOF", "NO", "ONE")


def test_a_read_only_replica_is_an_outage_that_says_so(plain: Stack, figures: Figures) -> None:
    endured = endure(plain, read_only(plain), HOLD_S, after_s=3.0)
    figures(f"Redis read-only for {HOLD_S:g} s (a primary made a replica)", str(endured))
    assert "read only replica" in endured.logs
    assert endured.sum("answers", "failed") == 0
    assert endured.recovery_ms <= BACK_MS * crowd()


SYNC = """
import json, sys, time
from balancer import Dispatcher
dispatcher = Dispatcher.connect(budget_ms=200)
print(dispatcher.dispatch("sync-first", 1).outcome.value, flush=True)
sys.stdin.readline()
slowest_ms, outcomes = 0.0, set()
for number in range(40):
    began_s = time.perf_counter()
    outcomes.add(dispatcher.dispatch(f"sync-{number}", 1).outcome.value)
    slowest_ms = max(slowest_ms, (time.perf_counter() - began_s) * 1e3)
    time.sleep(0.1)
print(json.dumps([slowest_ms, sorted(outcomes)]))
"""


def test_a_redis_whose_name_nobody_knows_does_not_hold_up_a_blocking_dispatcher(plain: Stack, figures: Figures) -> None:
    # A name server may take seconds to say that it does not know: longer than any budget, and not to be interrupted.
    process = plain.python(plain.dispatchers[0], SYNC)
    assert process.stdout
    assert process.stdout.readline() in ("placed\n", "repeated\n")
    with plain.killed("redis"):
        out, error = process.communicate("go\n", timeout=60)
        slowest_ms, outcomes = json.loads(out)
    figures("Redis gone, and its name with it: a blocking dispatcher", f"slowest of 40 answers {slowest_ms:.0f} ms")
    assert outcomes == ["fallback"], error
    assert slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
    wait_until(lambda: _answers(plain), "Redis answers")
