"""What a dispatcher does, without I/O: when to ask Redis, when to fall back, what to remember and to say.

Each verb is a generator that yields operations and is sent their results; `perform` and `perform_async` run it over a
store. So the sync and the async dispatcher differ by an `await`, and the decisions are written once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

from balancer import protocol
from balancer.aftermath import Aftermath
from balancer.breaker import Breaker
from balancer.errors import BalancerError, NoRank, NoRankReason, Refused, StoreDenied, StoreError
from balancer.last_known import LastKnown
from balancer.model import MAX_REQUESTS_PER_DISPATCH, EngineState, Outcome, Placement, PoolSnapshot, Request, Scope
from balancer.protocol import ANYWHERE, MAX_IDS_PER_RELEASE, MAX_IDS_PER_RENEW, Operation

log = logging.getLogger("balancer.dispatcher")

T = TypeVar("T")
Steps = Generator[Operation[Any], Any, T]

_EARLY: tuple[object, ...] = (NoRankReason.ALL_SILENT, NoRankReason.NOBODY_JOINED)
"""What Redis says of engines that are well and have not been able to report."""


@dataclass(slots=True)
class Counters:
    """How many requests went which way since this dispatcher began; `outages` counts how often Redis went away."""

    placed: int = 0
    repeated: int = 0
    fallback: int = 0
    no_rank: int = 0
    released: int = 0
    outages: int = 0


class Placing:
    """One dispatcher's decisions and its memory."""

    def __init__(
        self, pool: str, name: str, breaker: Breaker, last_known: LastKnown, aftermath: Aftermath | None = None
    ) -> None:
        self.pool, self.name = pool, name
        self.breaker, self.last_known = breaker, last_known
        self.aftermath = aftermath or Aftermath()
        self.counters = Counters()
        self._denied = ""  # why Redis refused us, where that is why it is away
        self._knows_pool = False  # whether Redis held the pool when it was last asked

    def dispatch(self, requests: Sequence[Request], scope: Scope = ANYWHERE) -> Steps[list[Placement | NoRank]]:
        """Place requests within `scope`; the answers stand in the order given, `NoRank` where there is no rank."""
        answers: list[Placement | NoRank] = []
        try:
            for start in range(0, len(requests), MAX_REQUESTS_PER_DISPATCH):
                answers += yield from self._dispatch_list(requests[start : start + MAX_REQUESTS_PER_DISPATCH], scope)
        except BaseException:  # the caller never learns of the lists before
            self.aftermath.owe(answer.request.request_id for answer in answers if _is_booked(answer))
            raise
        return answers

    def learn(self, snapshot: PoolSnapshot) -> PoolSnapshot:
        """Remember the loads of a snapshot, for when Redis is away; returns it."""
        self.last_known.learn({rank.rank: rank.load_tokens for rank in snapshot.ranks if rank.state is EngineState.UP})
        return snapshot

    def release(self, request_ids: Sequence[str]) -> Steps[int]:
        """End bookings; returns how many there were, 0 where Redis is away (then they are owed it)."""
        released = 0
        for start in range(0, len(request_ids), MAX_IDS_PER_RELEASE):
            operation = protocol.release(self.pool, request_ids[start : start + MAX_IDS_PER_RELEASE])
            try:
                count = (yield from self._released(operation)) if self.breaker.admits() else None
            except Refused:
                raise
            except BaseException:  # the caller gave up half-way
                self.aftermath.owe(request_ids[start:])
                raise
            if count is None:
                self.aftermath.owe(request_ids[start:])
                break
            released += count
        return released

    def renew(self, bookings: Sequence[tuple[str, int]]) -> Steps[int]:
        """Begin bookings' leases anew; returns how many there were, 0 where Redis is away (then they end)."""
        renewed = 0
        for start in range(0, len(bookings), MAX_IDS_PER_RENEW):
            if not self.breaker.admits():
                break
            try:
                renewed += yield from self._asked(
                    protocol.renew(self.pool, bookings[start : start + MAX_IDS_PER_RENEW])
                )
            except StoreError:
                break
        return renewed

    def _asked(self, operation: Operation[T]) -> Steps[T]:
        """Perform an operation, and learn by it whether Redis is away."""
        try:
            answer: T = yield operation
        except StoreError as error:
            self._lost(error)
            raise
        except Refused:
            self._regained()
            raise
        self._regained()
        return answer

    def _released(self, operation: Operation[int]) -> Steps[int | None]:
        """Perform a release; None where Redis was away."""
        try:
            count = yield from self._asked(operation)
        except StoreError:
            return None
        self.counters.released += count
        return count

    def _settle(self) -> Steps[float]:
        """Release what is owed since an outage, if it is time to; returns the seconds that it took."""
        if not (owed := self.aftermath.due()):
            return 0.0
        began_s = time.monotonic()
        count = yield from self._released(protocol.release(self.pool, owed))
        if count is not None:
            self.aftermath.settled(owed)
            if count:
                log.info("pool=%s had %d bookings whose dispatch got no answer: released", self.pool, count)
        return time.monotonic() - began_s

    def _dispatch_list(self, requests: Sequence[Request], scope: Scope) -> Steps[list[Placement | NoRank]]:
        spent_s = (yield from self._settle()) if not self.breaker.is_open else 0.0
        if not self.breaker.admits():
            return self._fall_back(requests, scope)
        wants_loads = self.last_known.wants_loads()
        operation = protocol.dispatch(self.pool, self.name, requests, wants_loads, scope)
        if spent_s:  # a dispatch and what goes before it have one budget
            operation = replace(operation, spent_s=spent_s)
        try:
            answer = yield from self._asked(operation)
        except StoreError as error:
            if not isinstance(error, StoreDenied):
                self.aftermath.owe(request.request_id for request in requests)
            return self._fall_back(requests, scope)
        except Refused:
            raise
        except BaseException:  # the caller gave up: it learns of no placement, and so needs no booking
            self.aftermath.owe(request.request_id for request in requests)
            raise
        self._look_for_loss(answer.knows_pool)
        self.aftermath.settled(request.request_id for request in requests)
        if answer.loads is not None:
            self.last_known.learn(answer.loads)
        else:
            for outcome in answer.outcomes:
                if isinstance(outcome, Placement) and outcome.outcome is Outcome.PLACED:
                    self.last_known.add(outcome.rank, outcome.request.tokens)
        return self._answers(requests, self._unless_early(requests, scope, answer.outcomes))

    def _unless_early(
        self, requests: Sequence[Request], scope: Scope, outcomes: Sequence[Placement | NoRankReason]
    ) -> Sequence[Placement | NoRankReason]:
        """The answers of Redis, and the last known loads where it is back and engines have not reported to it yet."""
        if not self.aftermath.is_under_way:
            return outcomes
        return [
            (self._last_known(request, scope) or outcome) if outcome in _EARLY else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _fall_back(self, requests: Sequence[Request], scope: Scope) -> list[Placement | NoRank]:
        outcomes: list[Placement | NoRankReason] = []
        for request in requests:
            placement = self._last_known(request, scope)
            if placement is None and self._denied:
                raise StoreDenied(self._denied)
            outcomes.append(placement or NoRankReason.UNREACHABLE)
        return self._answers(requests, outcomes)

    def _last_known(self, request: Request, scope: Scope) -> Placement | None:
        choice = self.last_known.choose(request.tokens, scope)
        return Placement(request, *choice, Outcome.FALLBACK) if choice else None

    def _answers(
        self, requests: Sequence[Request], outcomes: Sequence[Placement | NoRankReason]
    ) -> list[Placement | NoRank]:
        answers: list[Placement | NoRank] = []
        debug = log.isEnabledFor(logging.DEBUG)
        for request, outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, Placement):
                word = outcome.outcome.value
                setattr(self.counters, word, getattr(self.counters, word) + 1)
                answers.append(outcome)
            else:
                self.counters.no_rank += 1
                answers.append(NoRank(self.pool, outcome))
            if debug:
                log.debug(
                    "pool=%s request=%s tokens=%d -> %s",
                    self.pool,
                    request.request_id,
                    request.tokens,
                    _line(outcome),
                )
        return answers

    def _lost(self, error: StoreError) -> None:
        self._denied = str(error) if isinstance(error, StoreDenied) else ""
        if self.breaker.failed():
            self.counters.outages += 1
            log.warning("pool=%s falls back to the last known loads: %s", self.pool, error)

    def _regained(self) -> None:
        if self.breaker.succeeded():
            self.aftermath.begin()
            log.info("pool=%s is placed by Redis again", self.pool)

    def _look_for_loss(self, knows_pool: bool) -> None:
        """A Redis that held the pool and now holds none has lost its data, be it that nobody saw it go away."""
        if self._knows_pool and not knows_pool:
            self.aftermath.begin()
            log.warning("pool=%s is gone from Redis: by the last known loads until engines have reported", self.pool)
        self._knows_pool = knows_pool


def _is_booked(answer: Placement | NoRank) -> TypeGuard[Placement]:
    return isinstance(answer, Placement) and answer.outcome is Outcome.PLACED


def _line(outcome: Placement | NoRankReason) -> str:
    if isinstance(outcome, Placement):
        stale = " stale" if outcome.stale else ""
        return f"{outcome.outcome.value} rank={outcome.rank} load={outcome.load_tokens}{stale}"
    return f"no_rank reason={outcome.value}"


def perform(steps: Steps[T], run: Callable[[Operation[Any]], Any]) -> T:
    """Run `steps` to their end, each operation by `run`; what it raises goes back into the steps."""
    try:
        operation = next(steps)
        while True:
            try:
                result = run(operation)
            except BalancerError as error:
                operation = steps.throw(error)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        steps.close()  # where `run` was broken off they learn of it now, not when they are collected


async def perform_async(steps: Steps[T], run: Callable[[Operation[Any]], Awaitable[Any]]) -> T:
    """As `perform`, with an `await`."""
    try:
        operation = next(steps)
        while True:
            try:
                result = await run(operation)
            except BalancerError as error:
                operation = steps.throw(error)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        steps.close()  # where `run` was broken off they learn of it now, not when they are collected
