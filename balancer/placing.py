"""What a dispatcher does, without I/O: when to ask Redis, when to fall back, what to remember and to say.

Each verb is a generator that yields operations and is sent their results; `perform` and `perform_async` run it over a
store. So the sync and the async dispatcher differ by an `await`, and the decisions are written once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from balancer import protocol
from balancer.breaker import Breaker
from balancer.errors import BalancerError, NoRank, NoRankReason, Refused, StoreDenied, StoreError
from balancer.last_known import LastKnown
from balancer.model import MAX_REQUESTS_PER_DISPATCH, EngineState, Outcome, Placement, PoolSnapshot, Request
from balancer.protocol import MAX_IDS_PER_RELEASE, Operation

log = logging.getLogger("balancer.dispatcher")

T = TypeVar("T")
Steps = Generator[Operation[Any], Any, T]


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

    def __init__(self, pool: str, name: str, breaker: Breaker, last_known: LastKnown) -> None:
        self.pool, self.name = pool, name
        self.breaker, self.last_known = breaker, last_known
        self.counters = Counters()
        self._denied = ""  # why Redis refused us, where that is why it is away

    def dispatch(self, requests: Sequence[Request], avoid: Sequence[str] = ()) -> Steps[list[Placement | NoRank]]:
        """Place requests on ranks other than `avoid`; the answers stand in the order given, `NoRank` where there is no
        rank to give."""
        answers: list[Placement | NoRank] = []
        for start in range(0, len(requests), MAX_REQUESTS_PER_DISPATCH):
            answers += yield from self._dispatch_list(requests[start : start + MAX_REQUESTS_PER_DISPATCH], avoid)
        return answers

    def learn(self, snapshot: PoolSnapshot) -> PoolSnapshot:
        """Remember the loads of a snapshot, for when Redis is away; returns it."""
        self.last_known.learn({rank.rank: rank.load_tokens for rank in snapshot.ranks if rank.state is EngineState.UP})
        return snapshot

    def release(self, request_ids: Sequence[str]) -> Steps[int]:
        """End bookings; returns how many there were, 0 where Redis is away (then their lease ends them)."""
        released = 0
        for start in range(0, len(request_ids), MAX_IDS_PER_RELEASE):
            if not self.breaker.admits():
                break
            try:
                released += yield protocol.release(self.pool, request_ids[start : start + MAX_IDS_PER_RELEASE])
            except StoreError as error:
                self._lost(error)
                break
            except Refused:
                self._regained()
                raise
            self._regained()
        self.counters.released += released
        return released

    def _dispatch_list(self, requests: Sequence[Request], avoid: Sequence[str]) -> Steps[list[Placement | NoRank]]:
        if not self.breaker.admits():
            return self._fall_back(requests, avoid)
        wants_loads = self.last_known.wants_loads()
        try:
            answer: protocol.Dispatched = yield protocol.dispatch(self.pool, self.name, requests, wants_loads, avoid)
        except StoreError as error:
            self._lost(error)
            return self._fall_back(requests, avoid)
        except Refused:
            self._regained()
            raise
        self._regained()
        if answer.loads is not None:
            self.last_known.learn(answer.loads)
        else:
            for outcome in answer.outcomes:
                if isinstance(outcome, Placement) and outcome.outcome is Outcome.PLACED:
                    self.last_known.add(outcome.rank, outcome.request.tokens)
        return self._answers(requests, answer.outcomes)

    def _fall_back(self, requests: Sequence[Request], avoid: Sequence[str]) -> list[Placement | NoRank]:
        outcomes: list[Placement | NoRankReason] = []
        for request in requests:
            choice = self.last_known.choose(request.tokens, avoid)
            if choice is None and self._denied:
                raise StoreDenied(self._denied)
            outcomes.append(Placement(request, *choice, Outcome.FALLBACK) if choice else NoRankReason.UNREACHABLE)
        return self._answers(requests, outcomes)

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
            log.info("pool=%s is placed by Redis again", self.pool)


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
