"""Speaks in the pool for engines that have no hook, and keeps an eye on all engines.

An engine without a hook neither joins nor reports, so each replica does it for it, as long as the engine answers. The
replicas do not fight over it: they all use one and the same incarnation (its nonce follows from the engine's name and
size, so whoever joins second gets the first one's epoch) and one and the same report (step 1, nothing held), which when
repeated renews the engine's lease and changes nothing. The engine's load is then its bookings, which the replicas keep
until the answer ends. When no replica reaches it any more its lease ends, as with a hook.

An engine that this replica cannot reach, with a hook or without, is avoided by this replica until it answers again. One
that answers requests is reached, however long its health path takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from hashlib import blake2b

from balancer import protocol
from balancer.errors import BalancerError, Fenced, UnknownPool, WrongSize
from balancer.model import EngineState, Incarnation, RankCounts, Report
from balancer.serve.answer import UpstreamError
from balancer.serve.ending import end
from balancer.serve.options import Engine
from balancer.serve.upstream_pool import Pool
from balancer.serve.wire import request_head
from balancer.settings import Settings
from balancer.store import AsyncStore

log = logging.getLogger("balancer.serve")

_EVERY_S = 1.0
_PATIENCE_S, _MOST_PATIENCE_S = 2.0, 10.0
"""For a look: three times what the last one took. One that was silent is avoided already, so it may take its time."""
_HEARD_S = 3.0
"""An answer to a request says for so long that the engine lives, whatever its health path says."""
_STEP = 1


def incarnation_of(engine: Engine) -> Incarnation:
    """The one incarnation that all replicas share for an engine without a hook."""
    nonce = "stand-in-" + blake2b(f"{engine.name} {engine.dp}".encode(), digest_size=6).hexdigest()
    return Incarnation(engine.name, engine.dp, nonce, None, engine.address)


class StandIn:
    """Looks after one engine."""

    def __init__(self, engine: Engine, pool: Pool, settings: Settings) -> None:
        self.engine = engine
        self.answers = True
        """Whether the engine answered when last asked; believed until it is asked."""
        self.heard = float("-inf")
        """When an answer to a request last came from it (`time.monotonic`)."""
        self.has_joined = engine.hooked
        self._patience_s = _PATIENCE_S
        self._pool = pool
        self._settings = settings
        self._store = AsyncStore(settings)
        self._incarnation = incarnation_of(engine)
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._complained = ""

    def start(self) -> None:
        """Begin to look after it."""
        self._task = asyncio.create_task(self._look_after())

    def suspect(self, is_certain: bool) -> None:
        """A request failed: look at the engine now, and, where it took no connection, avoid it until then.

        One that broke off may have met a request that breaks it, which is no reason to turn others away.
        """
        if is_certain:
            self.heard = float("-inf")
        if is_certain and self.answers:
            self.answers = False
            log.info("engine=%s url=%s takes no connection: avoided until it does", self.engine.name, self.engine.url)
        self._look.set()

    async def stop(self) -> None:
        """Stop; the engine's lease ends by itself, unless other replicas look after it."""
        if self._task:
            await end([self._task])
        await self._store.aclose()

    async def _look_after(self) -> None:
        while True:
            is_alive = await self._is_alive()
            was, self.answers = self.answers, is_alive or time.monotonic() - self.heard < _HEARD_S
            if was != self.answers:
                word = "answers again" if self.answers else "does not answer: avoided until it does"
                log.info("engine=%s url=%s %s", self.engine.name, self.engine.url, word)
            if self.answers and not self.engine.hooked:
                await self._report()
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._look.wait()
                await asyncio.sleep(_EVERY_S / 5)  # a suspect is looked at sooner, not at every request

    async def _is_alive(self) -> bool:
        head = request_head(self.engine, "GET", self.engine.health.encode(), [], [], None)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._patience_s):
                for _ in range(2):
                    connection, is_reused = await self._pool.acquire()
                    try:
                        answer = await connection.send(head, no_body=False)
                        await connection.relay(lambda _: None)
                    except UpstreamError:
                        if not is_reused:
                            return False
                        continue
                    finally:
                        connection.give_back()
                    self._patience_s = min(max(_PATIENCE_S, 3 * (time.monotonic() - began)), _MOST_PATIENCE_S)
                    return answer.status < 500
        except UpstreamError as error:
            return self.answers and error.is_ours  # then nothing was learned of the engine
        except TimeoutError:
            self._patience_s = _MOST_PATIENCE_S
        return False

    async def _report(self) -> None:
        pool = self._settings.pool
        try:
            if not self._incarnation.epoch:
                if not await self._may_join():
                    return
                self._incarnation = await self._store.run(protocol.join(pool, self._incarnation))
                self.has_joined = True
            report = Report(_STEP, [RankCounts(0, 0)] * self.engine.dp)
            await self._store.run(protocol.report(pool, self._incarnation, report))
            self._complained = ""
        except (Fenced, WrongSize):
            # A Redis that was emptied knows other replicas' later join, or a hook has joined under this name.
            self._incarnation = replace(self._incarnation, epoch=0)
        except BalancerError as error:
            self._complain(str(error))

    async def _may_join(self) -> bool:
        """Whether nobody else speaks for this engine: a join would throw a hook's life out, and the two take turns."""
        try:
            snapshot = await self._store.run(protocol.snapshot(self._settings.pool))
        except UnknownPool:
            return True
        name, size = self.engine.name, self.engine.dp
        for view in snapshot.engines:
            if (
                view.engine == name
                and view.state is not EngineState.SILENT
                and (view.step > _STEP or view.size != size)
            ):
                self._complain(
                    f"somebody else reports {view.name} with {view.size} ranks: if it has a hook, say hook={name}; "
                    "all replicas must be told the same dp"
                )
                return False
        return True

    def _complain(self, text: str) -> None:
        if text != self._complained:
            log.warning("pool=%s engine=%s cannot be reported: %s", self._settings.pool, self.engine.name, text)
            self._complained = text
