"""One replica: engines, bookings, front door and what is asked of the replica itself, put together.

A replica is stateless but for what it is doing: what it knows of ranks is in Redis. So there may be any number.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import ssl
import time
from dataclasses import dataclass, replace

import orjson

from balancer.errors import InvalidInput, NoRank, NoRankReason
from balancer.model import Placement
from balancer.serve import decision
from balancer.serve.bookings import Bookings
from balancer.serve.complaint import complaint
from balancer.serve.exchange import Exchange
from balancer.serve.front import Client, Server
from balancer.serve.inbound import Inbound
from balancer.serve.metrics import CONTENT_TYPE, Metrics
from balancer.serve.options import Engine, Options
from balancer.serve.retries import RetryBudget
from balancer.serve.stand_in import StandIn, avoided
from balancer.serve.tokens import TokenCounter
from balancer.serve.upstream import Pool
from balancer.serve.wire import Headers
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")

_JSON = (b"Content-Type", b"application/json")


@dataclass(slots=True)
class Target:
    """An engine, the way to it, and whether it answers."""

    engine: Engine
    pool: Pool
    stand_in: StandIn


class Replica:
    """A dispatcher with a front door. Belongs to one event loop."""

    def __init__(self, options: Options, settings: Settings) -> None:
        self.options, self.settings = options, settings
        self.metrics = Metrics(settings.pool)
        self.tokens = TokenCounter(options.tokenizer)
        self.retries = RetryBudget(options.retry_share)
        self.bookings = Bookings(settings)
        self.targets = [self._target(engine) for engine in options.engines]
        self._by_rank = {
            rank: (target, index) for target in self.targets for index, rank in enumerate(target.engine.ranks)
        }
        self._strangers: tuple[str, ...] = ()
        self._seen_ranks: frozenset[str] = frozenset()
        self._turn = 0
        self._keys = tuple(f"Bearer {key}".encode() for key in options.api_keys)
        self.server = Server(self._answer, options.limits)
        self.server.complaint = complaint

    def _target(self, engine: Engine) -> Target:
        tls = ssl.create_default_context() if engine.tls else None
        pool = Pool(engine, self.options.connect_s, tls)
        # Not on the way of a request: an engine's report may take longer than a placement.
        patient = replace(self.settings, budget_ms=max(self.settings.budget_ms, 1_000))
        return Target(engine, pool, StandIn(engine, pool, patient))

    # -- life

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound socket; engines without a hook are spoken for from now on."""
        self.bookings.start()
        for target in self.targets:
            target.stand_in.start()
        await self.server.start(sock, **self._tls())

    async def wait_for_ranks(self, within_s: float) -> None:
        """Wait until every engine without a hook has been joined, or the time has passed: it serves in either case."""
        deadline = time.monotonic() + within_s
        while not all(target.stand_in.has_joined for target in self.targets) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Take no more requests, let those under way end within the limit, release what is left, and close."""
        cut_off = await self.server.stop(self.options.stop_s)
        if cut_off:
            log.warning("pool=%s %d connections cut off at the end", self.settings.pool, cut_off)
        for target in self.targets:
            await target.stand_in.stop()
            target.pool.close()
        await self.bookings.stop()
        self.tokens.close()

    def _tls(self) -> dict[str, ssl.SSLContext]:
        options = self.options
        if not options.cert_file:
            return {}
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(options.cert_file, options.key_file)
        except OSError as error:
            raise InvalidInput(f"the front door's certificate or key cannot be used: {error}") from None
        return {"ssl": context}

    # -- where to

    def target_of(self, placement: Placement) -> tuple[Target, int] | None:
        """The engine that a placement means and the rank's index behind its address; None for a stranger's."""
        return self._by_rank.get(placement.rank)

    def avoided(self) -> tuple[str, ...]:
        """Ranks that this replica cannot reach. Where that would be all of them, it takes none for lost: a wrong look
        must not turn everybody away."""
        silent: tuple[str, ...] = ()
        if any(target.stand_in.answers for target in self.targets):
            silent = avoided(target.stand_in for target in self.targets)
        strangers = self._strangers_in(self.bookings.ranks)
        return (*silent, *strangers) if strangers else silent

    def _strangers_in(self, ranks: frozenset[str]) -> tuple[str, ...]:
        """Ranks of engines that this replica was not told of."""
        if ranks is not self._seen_ranks:
            self._seen_ranks = ranks
            strangers = tuple(sorted(ranks - self._by_rank.keys()))
            if strangers and strangers != self._strangers:
                listed = ", ".join(strangers[:8])
                log.warning("pool=%s ranks without an --engine here are avoided: %s", self.settings.pool, listed)
            self._strangers = strangers
        return self._strangers

    def any_target(self, failed: tuple[str, ...]) -> Target:
        """An engine for a request that is not placed, in turn; raises `NoRank` where all have failed."""
        untried = [target for target in self.targets if target.engine.ranks[0] not in failed]
        if not untried:
            raise NoRank(self.settings.pool, NoRankReason.ALL_SILENT)
        alive = [target for target in untried if target.stand_in.answers] or untried
        self._turn += 1
        return alive[self._turn % len(alive)]

    def has_other(self, target: Target) -> bool:
        """Whether there is another engine to try."""
        return any(other is not target and other.stand_in.answers for other in self.targets)

    # -- requests

    async def _answer(self, client: Client, request: Inbound) -> None:
        path = request.path
        if path in (b"/healthz", b"/readyz"):
            return client.respond(request, *self._health(path))
        if self._keys and not self._is_let_in(request):
            return client.respond(request, 401, *complaint(401, "no valid API key", "invalid_api_key", path))
        if path == b"/metrics":
            return client.respond(request, *self._metrics())
        if path.startswith(decision.PREFIX):
            return client.respond(request, *await decision.decide(self, request))
        if not request.target.startswith(b"/") and request.target != b"*":
            return client.respond(request, 400, *complaint(400, "a path is wanted", "invalid_target"))
        await Exchange(self, client, request).run()

    def _is_let_in(self, request: Inbound) -> bool:
        given = request.header(b"authorization")
        if given is None and (key := request.header(b"x-api-key")) is not None:  # Anthropic's clients
            given = b"Bearer " + key
        if given is None:
            return False
        return any(hmac.compare_digest(given, key) for key in self._keys)

    def _health(self, path: bytes) -> tuple[int, Headers, bytes]:
        reachable = sum(target.stand_in.answers for target in self.targets)
        away = self.bookings.dispatcher.is_falling_back
        ready = path == b"/healthz" or (reachable > 0 and not self.server.stopping)
        if path == b"/readyz" and not self.bookings.is_pool_known and not away:
            ready = False
        fields = {
            "status": "ok" if ready else "not_ready",
            "pool": self.settings.pool,
            "engines": len(self.targets),
            "engines_answering": reachable,
            "redis": "away" if away else "ok",
            "stopping": self.server.stopping,
        }
        return (200 if ready else 503), [_JSON], orjson.dumps(fields)

    def _metrics(self) -> tuple[int, Headers, bytes]:
        self.metrics.fallback.set(int(self.bookings.dispatcher.is_falling_back))
        self.metrics.connections.set(len(self.server.clients))
        return 200, [(b"Content-Type", CONTENT_TYPE)], self.metrics.text()
