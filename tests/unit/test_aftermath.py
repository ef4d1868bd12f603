"""After an outage nobody is refused because engines could not report, and no booking stays that nobody wants."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import redis

from balancer import (
    AsyncDispatcher,
    Dispatcher,
    NoRank,
    NoRankReason,
    Outcome,
    Placement,
    RankCounts,
    Reporter,
    Request,
    Settings,
    StoreDenied,
    StoreUnavailable,
    in_flight_id,
    protocol,
)
from balancer.admin import PoolAdmin
from balancer.aftermath import Aftermath
from balancer.breaker import Breaker
from balancer.embedded import EmbeddedRedis
from balancer.last_known import LastKnown
from balancer.placing import Placing, perform

Eventually = Callable[..., None]
PROBE_S, AFTERMATH_S = 0.5, 2.0


class FakeRedis:
    """Answers as told, and keeps what it was asked; `now_s` is everybody's clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.fails: Exception | None = None
        self.says: NoRankReason | None = None
        self.asked: list[tuple[str, int]] = []
        self.released: list[int] = []
        self.placing = Placing(
            "p",
            "d",
            Breaker(int(PROBE_S * 1_000), self.clock),
            LastKnown(clock=self.clock),
            Aftermath(int(AFTERMATH_S * 1_000), clock=self.clock),
        )

    def clock(self) -> float:
        return self.now_s

    def run(self, operation: protocol.Operation[Any]) -> Any:
        self.asked.append((operation.script, len(operation.arguments)))
        if self.fails:
            raise self.fails
        if operation.script == "release":
            self.released += [int(id_) for id_ in operation.arguments]
            return len(operation.arguments)
        _, wants_loads, *words = operation.arguments
        requests = [Request(str(name), int(tokens)) for tokens, name in zip(words[1::3], words[2::3], strict=True)]
        outcomes = tuple(self.says or Placement(request, "e/0", 0, Outcome.PLACED) for request in requests)
        return protocol.Dispatched(outcomes, ({} if self.says else {"e/0": 0, "e/1": 0}) if wants_loads else None)

    def dispatch(self, request_id: str) -> str:
        """The outcome, or why there is none."""
        (answer,) = perform(self.placing.dispatch([Request(request_id, 1)]), self.run)
        return answer.reason.value if isinstance(answer, NoRank) else answer.outcome.value

    def release(self, *request_ids: str) -> int:
        return perform(self.placing.release(request_ids), self.run)

    def outage(self, *request_ids: str) -> None:
        """Redis is away for one probe; these are asked meanwhile."""
        self.fails = StoreUnavailable("away")
        for request_id in request_ids:
            self.now_s += PROBE_S
            assert self.dispatch(request_id) == "fallback"
        self.fails = None
        self.now_s += PROBE_S


@pytest.fixture
def fake() -> FakeRedis:
    """A Redis that has placed one request."""
    fake = FakeRedis()
    assert fake.dispatch("first") == "placed"
    return fake


# -- engines that have not been able to report


@pytest.mark.parametrize("early", [NoRankReason.ALL_SILENT, NoRankReason.NOBODY_JOINED])
def test_a_redis_that_is_back_before_its_engines_costs_no_request(fake: FakeRedis, early: NoRankReason) -> None:
    fake.outage("lost")
    fake.says = early
    assert [fake.dispatch(f"r{number}") for number in range(4)] == ["fallback"] * 4
    fake.says = None
    assert fake.dispatch("engines are back") == "placed"
    assert fake.placing.counters.no_rank == 0


def test_engines_that_stay_silent_are_called_so_when_the_aftermath_is_over(fake: FakeRedis) -> None:
    fake.outage("lost")
    fake.says = NoRankReason.ALL_SILENT
    assert fake.dispatch("early") == "fallback"
    fake.now_s += AFTERMATH_S
    assert fake.dispatch("late") == "all_silent"


def test_silence_without_an_outage_is_believed_at_once(fake: FakeRedis) -> None:
    fake.says = NoRankReason.ALL_SILENT
    assert fake.dispatch("a") == "all_silent"


@pytest.mark.parametrize("reason", [NoRankReason.ALL_DRAINING, NoRankReason.ALL_FULL])
def test_what_redis_knows_is_believed_in_an_aftermath_too(fake: FakeRedis, reason: NoRankReason) -> None:
    fake.outage("lost")
    fake.says = reason
    assert fake.dispatch("a") == reason.value


def test_a_dispatcher_that_knows_no_rank_says_what_redis_says() -> None:
    fake = FakeRedis()
    fake.fails = StoreUnavailable("away")
    assert fake.dispatch("lost") == "unreachable"
    fake.fails, fake.says = None, NoRankReason.ALL_SILENT
    fake.now_s += PROBE_S
    assert fake.dispatch("a") == "all_silent"


def test_a_pool_that_came_back_empty_is_served_until_its_engine_joins_again(
    settings: Settings, client: redis.Redis, redis_server: EmbeddedRedis, eventually: Eventually
) -> None:
    reporter = Reporter(settings, "e", 2)
    reporter.report(1, [RankCounts(0, 0)] * 2)
    with Dispatcher.connect(settings.url, "p", budget_ms=200, probe_ms=50) as dispatcher:
        dispatcher.dispatch("a", 1)
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            assert dispatcher.dispatch("b", 1).outcome is Outcome.FALLBACK
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)
        eventually(client.ping, "Redis answers")
        client.flushdb()
        eventually(lambda: not dispatcher.dispatch("c", 1) or not dispatcher.is_falling_back, "Redis is back")
        assert dispatcher.dispatch("d", 1).outcome is Outcome.FALLBACK
        reporter.report(2, [RankCounts(0, 0)] * 2)
        assert dispatcher.dispatch("e", 1).outcome is Outcome.PLACED
    reporter.close()


def test_a_redis_that_loses_its_data_between_two_requests_costs_none(
    settings: Settings, client: redis.Redis, dispatcher: Dispatcher
) -> None:
    reporter = Reporter(settings, "e", 2)
    reporter.report(1, [RankCounts(0, 0)] * 2)
    assert dispatcher.dispatch("a", 1).outcome is Outcome.PLACED
    client.flushdb()
    assert [dispatcher.dispatch(f"b{number}", 1).outcome for number in range(3)] == [Outcome.FALLBACK] * 3
    reporter.report(2, [RankCounts(0, 0)] * 2)
    assert dispatcher.dispatch("c", 1).outcome is Outcome.PLACED
    reporter.close()


def test_a_pool_whose_last_engine_has_left_has_no_rank_at_once(settings: Settings, dispatcher: Dispatcher) -> None:
    reporter = Reporter(settings, "e", 2)
    reporter.report(1, [RankCounts(0, 0)] * 2)
    assert dispatcher.dispatch("a", 1).outcome is Outcome.PLACED
    reporter.leave()
    with pytest.raises(NoRank, match="nobody_joined"):
        dispatcher.dispatch("b", 1)
    reporter.close()


# -- bookings that nobody wants


def test_a_dispatch_whose_answer_was_lost_is_released_when_the_aftermath_is_over(fake: FakeRedis) -> None:
    fake.outage("lost")
    assert fake.dispatch("back") == "placed"
    fake.now_s += AFTERMATH_S - 0.1
    assert fake.dispatch("early") == "placed"
    assert fake.released == []
    fake.now_s += 0.1
    assert fake.dispatch("late") == "placed"
    assert fake.released == [in_flight_id("lost")]
    fake.now_s += 10 * AFTERMATH_S
    fake.dispatch("much later")
    assert len(fake.released) == 1, "once"


def test_a_request_that_is_placed_after_all_keeps_its_booking(fake: FakeRedis) -> None:
    fake.outage("lost")
    assert fake.dispatch("lost") == "placed"
    fake.now_s += 2 * AFTERMATH_S
    fake.dispatch("late")
    assert fake.released == []


def test_what_was_placed_without_asking_redis_is_owed_nothing(fake: FakeRedis) -> None:
    fake.fails = StoreUnavailable("away")
    assert [fake.dispatch(name) for name in ("lost", "not asked", "nor this")] == ["fallback"] * 3
    fake.fails = None
    fake.now_s += PROBE_S
    fake.dispatch("back")
    fake.now_s += AFTERMATH_S
    fake.dispatch("late")
    assert fake.released == [in_flight_id("lost")]


def test_a_release_that_did_not_reach_redis_is_made_good(fake: FakeRedis) -> None:
    fake.fails = StoreUnavailable("away")
    assert fake.release("first") == 0
    assert fake.release("second") == 0, "not even tried"
    fake.fails = None
    fake.now_s += PROBE_S
    fake.dispatch("back")
    fake.now_s += AFTERMATH_S
    fake.dispatch("late")
    assert fake.released == [in_flight_id("first"), in_flight_id("second")]
    assert fake.placing.counters.released == 2


def test_a_refused_dispatch_is_owed_nothing(fake: FakeRedis) -> None:
    fake.fails = StoreDenied("wrong password")
    fake.dispatch("denied")
    fake.fails = None
    fake.now_s += PROBE_S
    fake.dispatch("back")
    fake.now_s += AFTERMATH_S
    fake.dispatch("late")
    assert fake.released == []


def test_a_release_that_is_owed_and_fails_is_tried_again_after_the_next_outage(fake: FakeRedis) -> None:
    fake.outage("lost")
    fake.dispatch("back")
    fake.now_s += AFTERMATH_S
    fake.fails = StoreUnavailable("away again")
    assert fake.dispatch("a") == "fallback"
    assert fake.asked[-1][0] == "release", "one failure is enough: the dispatch is not tried as well"
    fake.fails = None
    fake.now_s += PROBE_S
    fake.dispatch("b")
    fake.now_s += AFTERMATH_S
    fake.dispatch("c")
    assert fake.released == [in_flight_id("lost")]


def test_many_owed_ids_are_released_a_few_with_each_dispatch() -> None:
    now_s = 0.0
    aftermath = Aftermath(2_000, clock=lambda: now_s)
    names = [f"r{number}" for number in range(600)]
    aftermath.owe(names)
    now_s = 2.0
    seen: Counter[str] = Counter()
    sizes = []
    while due := aftermath.due():
        sizes.append(len(due))
        seen.update(due)
        aftermath.settled(due)
    assert sizes == [256, 256, 88]
    assert seen == Counter(names)


def test_of_too_many_owed_ids_the_oldest_are_left_to_their_lease() -> None:
    now_s = 0.0
    aftermath = Aftermath(2_000, most_ids=3, clock=lambda: now_s)
    aftermath.owe("abcde")
    now_s = 2.0
    assert aftermath.due() == list("cde")


def test_ids_that_are_due_are_given_to_one_dispatch_only() -> None:
    now_s = 0.0
    aftermath = Aftermath(2_000, clock=lambda: now_s)
    aftermath.owe("a")
    now_s = 2.0
    assert aftermath.due() == ["a"]
    assert aftermath.due() == []
    now_s = 4.0
    assert aftermath.due() == ["a"], "whose release may have failed"


async def test_a_dispatch_that_its_caller_gave_up_leaves_no_booking(settings: Settings, admin: PoolAdmin) -> None:
    reporter = Reporter(settings, "e", 1)
    reporter.report(1, [RankCounts(0, 0)])
    reporter.close()
    async with AsyncDispatcher(settings) as dispatcher:
        dispatcher._placing.aftermath = Aftermath(1)
        await dispatcher.dispatch("kept", 1)
        given_up = 0
        for number in range(200):
            task = asyncio.ensure_future(dispatcher.dispatch(f"r{number}", 1))
            for _ in range(number % 12):  # so many turns of the loop, then its client has gone
                await asyncio.sleep(0)
            given_up += task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                await dispatcher.release(f"r{number}")
        assert given_up > 50
        for number in range(5):
            await asyncio.sleep(0.005)
            await dispatcher.dispatch(f"later-{number}", 1)
        await dispatcher.release(*(f"later-{number}" for number in range(5)))
    assert admin.snapshot().bookings == 1


def test_of_a_list_in_parts_the_parts_before_a_failure_are_released_too(fake: FakeRedis) -> None:
    steps = fake.placing.dispatch([Request(f"r{number}", 1) for number in range(300)])
    steps.send(fake.run(next(steps)))
    with pytest.raises(asyncio.CancelledError):
        steps.throw(asyncio.CancelledError())
    for _ in range(2):
        fake.now_s += AFTERMATH_S
        fake.dispatch("later")
    assert set(fake.released) == {in_flight_id(f"r{number}") for number in range(300)}


def test_a_release_that_its_caller_gave_up_is_made_later(fake: FakeRedis) -> None:
    steps = fake.placing.release(["a", "b"])
    next(steps)
    with pytest.raises(asyncio.CancelledError):
        steps.throw(asyncio.CancelledError())
    fake.now_s += AFTERMATH_S
    fake.dispatch("later")
    assert set(fake.released) == {in_flight_id("a"), in_flight_id("b")}


# -- what is on its way when a connection is given up


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_a_connection_has_not_delivered_when_it_is_given_up_is_never_delivered(kind: str) -> None:
    requests = [Request(f"{number}-{'x' * 500}", 1) for number in range(256)]
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)  # the rest stays with the sender
        server.bind(("127.0.0.1", 0))
        server.listen()
        settings = Settings(f"redis://127.0.0.1:{server.getsockname()[1]}/0", pool="p", budget_ms=100)
        if kind == "sync":
            with Dispatcher(settings) as dispatcher:
                answers = dispatcher.dispatch_many(requests)
        else:
            answers = asyncio.run(_ask(settings, requests))
        assert {type(answer) for answer in answers} == {NoRank}
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            arrived, how = _all_of(connection)
        assert how == "reset"
        assert arrived < 100_000


def _all_of(connection: socket.socket) -> tuple[int, str]:
    """How many bytes arrive, and how that ends."""
    arrived = 0
    try:
        while chunk := connection.recv(65_536):
            arrived += len(chunk)
    except ConnectionResetError:
        return arrived, "reset"
    return arrived, "farewell"


async def _ask(settings: Settings, requests: list[Request]) -> list[Placement | NoRank]:
    async with AsyncDispatcher(settings) as dispatcher:
        return await dispatcher.dispatch_many(requests)
