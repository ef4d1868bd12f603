"""Bookings from placement to end: this replica's whole talk with Redis.

Requests that come in the same loop turn, or while earlier ones are being placed, go in one EVAL. Releases go together
too, and wait out an absent Redis. A request that is still open after a while has its booking's lease renewed, and on an
engine without a hook the tokens that it has generated so far are added: nobody else counts them.

A client that leaves while its request is being placed cannot leave a booking behind: the placement is not broken off
half-way but released when it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from balancer import protocol
from balancer.dispatcher import AsyncDispatcher
from balancer.errors import BalancerError, NoRank
from balancer.model import MAX_REQUESTS_PER_DISPATCH, MAX_TOKENS, EngineState, Outcome, Placement, Request
from balancer.protocol import MAX_IDS_PER_RELEASE
from balancer.serve.ending import end
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")

_AT_ONCE = 4
"""EVALs under way before further requests wait to share one."""
_MOST_WAITING = 100_000
"""Releases kept while Redis is away; what is beyond is left to its lease."""
_RELEASE_AGAIN_S = 0.5
_GATHER_S = 0.02
"""Releases of so long go in one EVAL: a load is above the truth for that time, never below."""
_NOT_URGENT_S = 0.25
_LOOK_S = 0.25
_GROWN = 1.125
"""An answer that grows is told when it holds so many times what the pool knows of: a load is then wrong by an eighth or
by what comes between two looks, and a long request costs hardly more renewals than its lease needs."""
_SETTINGS_S = 10.0


@dataclass(slots=True)
class Open:
    """A booking that may have to be renewed. `tokens`: what to book now, 0 to leave as it is; `known`: what the pool
    knows of them; `due`: when the lease wants it."""

    tokens: int
    known: int
    due: float
    is_counted: bool


@dataclass(slots=True)
class _Asked:
    request: Request
    among: tuple[str, ...]
    answer: asyncio.Future[Placement]


class Bookings:
    """The bookings of one replica; `ours`: the ranks of its engines."""

    def __init__(self, settings: Settings, ours: frozenset[str] = frozenset()) -> None:
        self.dispatcher = AsyncDispatcher(settings)
        self.open: dict[str, Open] = {}
        self.booking_lease_s = 60.0
        self.policy = ""
        self.is_rank_known = False
        """Whether one of ours is among `ranks`."""
        self.ranks: frozenset[str] = frozenset()
        """Ranks of the pool that may be chosen, as last seen: all but the silent, or all where none else is left."""
        self._ours = ours
        self._pool = settings.pool
        self._asked: deque[_Asked] = deque()
        self._under_way = 0
        self._flush_is_due = False
        self._ended: dict[str, None] = {}
        self._ended_before: dict[str, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_releasing = False
        self._releases = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to release and to renew."""
        for work in (self._release_ended, self._renew_open, self._read_settings):
            self._keep(work())

    # -- placing

    def place(self, request_id: str, tokens: int, among: tuple[str, ...] = ()) -> asyncio.Future[Placement]:
        """A rank for a request, booked, one of `among` where any are named; raises `NoRank`, `Refused` or `StoreError`
        by the future.

        Whoever cancels the future need not release.
        """
        answer: asyncio.Future[Placement] = self._loop.create_future()
        if not self.dispatcher.is_falling_back:  # an earlier request's end must not end this one
            self._ended.pop(request_id, None)
            self._ended_before.pop(request_id, None)
        self._asked.append(_Asked(Request(request_id, tokens), among, answer))
        self._want_flush()
        return answer

    def _want_flush(self) -> None:
        if not self._flush_is_due and self._under_way < _AT_ONCE and self._asked:
            self._flush_is_due = True
            self._keep(self._flush())

    async def _flush(self) -> None:
        """One EVAL: begun a loop turn after the first request asked for it, for all that have asked by then."""
        self._flush_is_due = False
        self._under_way += 1
        batch = [self._asked.popleft()]
        among = batch[0].among
        while self._asked and self._asked[0].among == among and len(batch) < MAX_REQUESTS_PER_DISPATCH:
            batch.append(self._asked.popleft())
        self._want_flush()
        try:
            placed = await self.dispatcher.dispatch_many([asked.request for asked in batch], among=among)
        except Exception as error:
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
        else:
            for asked, answer in zip(batch, placed, strict=True):
                if asked.answer.done():  # its client has gone
                    if not isinstance(answer, NoRank):
                        self.end(asked.request.request_id)
                elif isinstance(answer, NoRank):
                    asked.answer.set_exception(answer)
                else:
                    asked.answer.set_result(answer)
        finally:
            self._under_way -= 1
            self._want_flush()

    # -- ending

    def end(self, request_id: str, is_urgent: bool = True) -> None:
        """Release a booking soon; harmless where it has ended already. Not urgent: where an acknowledgement has most
        likely ended it."""
        self.open.pop(request_id, None)
        if len(self._ended) + len(self._ended_before) >= _MOST_WAITING:
            return
        if is_urgent:
            self._ended[request_id] = None
            self._releases.set()
        else:
            self._ended_before[request_id] = None
            if self._timer is None:
                self._timer = self._loop.call_later(_NOT_URGENT_S, self._release_those_before)

    def _release_those_before(self) -> None:
        self._timer = None
        self._ended |= self._ended_before
        self._ended_before = {}
        self._releases.set()

    async def end_now(self, request_id: str) -> None:
        """Release a booking before going on: the same request is about to be placed again."""
        self.open.pop(request_id, None)
        with contextlib.suppress(BalancerError):
            await self.dispatcher.release(request_id)

    async def _release_ended(self) -> None:
        while True:
            await self._releases.wait()
            self._releases.clear()
            await asyncio.sleep(_GATHER_S)
            while self._ended:
                if not await self._release(list(self._ended)[:MAX_IDS_PER_RELEASE]):
                    await asyncio.sleep(_RELEASE_AGAIN_S)

    async def _release(self, ids: Sequence[str]) -> bool:
        for request_id in ids:  # before the wait: an id that is placed and ends again meanwhile is released again
            del self._ended[request_id]
        self._is_releasing = True
        try:
            await self.dispatcher.release(*ids)
        except BalancerError as error:
            log.warning("pool=%s bookings not released: %s", self._pool, error)
        else:
            if self.dispatcher.is_falling_back:
                self._ended = dict.fromkeys(ids) | self._ended
                return False
        finally:
            self._is_releasing = False
        return True

    # -- lasting

    def watch(self, placement: Placement, is_counted: bool) -> Open | None:
        """Renew this booking's lease while its request is open. `is_counted`: on an engine that does not count itself;
        then the caller keeps `tokens` of what is returned at what the request holds now."""
        if placement.outcome is Outcome.FALLBACK:
            return None
        tokens = placement.request.tokens if is_counted else 0
        opened = Open(tokens, tokens, time.monotonic() + self.booking_lease_s / 4, is_counted)
        self.open[placement.request.request_id] = opened
        return opened

    async def _renew_open(self) -> None:
        while True:
            await asyncio.sleep(min(_LOOK_S, self.booking_lease_s / 4))
            now = time.monotonic()
            due = [
                (request_id, opened)
                for request_id, opened in self.open.items()
                if opened.due <= now or opened.tokens > _GROWN * opened.known
            ]
            for start in range(0, len(due), protocol.MAX_IDS_PER_RENEW):
                part = due[start : start + protocol.MAX_IDS_PER_RENEW]
                held = [opened.tokens for _, opened in part]
                ids = [request_id for request_id, _ in part]
                try:
                    await self.dispatcher.renew(*zip(ids, (min(tokens, MAX_TOKENS) for tokens in held), strict=True))
                except BalancerError as error:  # a refusal: the same would be refused again
                    log.warning("pool=%s bookings not renewed: %s", self._pool, error)
                if self.dispatcher.is_falling_back:
                    continue  # not told: they stay due
                for (_, opened), tokens in zip(part, held, strict=True):
                    opened.known, opened.due = tokens, now + self.booking_lease_s / 4

    async def look(self) -> None:
        """Read what the pool has agreed on and which ranks it has; an absent Redis leaves it as it was."""
        with contextlib.suppress(BalancerError):
            snapshot = await self.dispatcher.snapshot()
            self.booking_lease_s = snapshot.settings.booking_lease_ms / 1000
            self.policy = snapshot.settings.policy
            heard = frozenset(view.rank for view in snapshot.ranks if view.state is not EngineState.SILENT)
            self.ranks = heard or frozenset(view.rank for view in snapshot.ranks)
            self.is_rank_known = not self._ours.isdisjoint(self.ranks)

    async def _read_settings(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_SETTINGS_S if self.is_rank_known else _RELEASE_AGAIN_S)

    # -- stopping

    async def stop(self, within_s: float = 2.0) -> None:
        """Release what has ended, and close the connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._release_those_before()
        deadline = time.monotonic() + within_s
        while (self._ended or self._is_releasing or self._under_way) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await end(tuple(self._tasks))
        await self.dispatcher.aclose()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
