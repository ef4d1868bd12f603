"""One replica: engines, bookings, front door and what is asked of the replica itself, put together.

A replica is stateless but for what it is doing: what it knows of ranks is in Redis. So there may be any number.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time

import orjson

from balancer.serve import decision
from balancer.serve.access_log import Entry
from balancer.serve.complaint import complaint
from balancer.serve.desk import Desk
from balancer.serve.ending import end
from balancer.serve.endpoints import is_placed
from balancer.serve.exchange import Exchange
from balancer.serve.front import Client, Server
from balancer.serve.inbound import Inbound
from balancer.serve.metrics import CONTENT_TYPE
from balancer.serve.options import Options
from balancer.serve.tls import front_door
from balancer.serve.wire import Headers, safe_request_id
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")

_JSON = (b"Content-Type", b"application/json")
_GAUGE_S = 1.0


class Replica(Desk):
    """A dispatcher with a front door. Belongs to one event loop."""

    def __init__(self, options: Options, settings: Settings) -> None:
        super().__init__(options, settings)
        self._keys = tuple(key.encode() for key in options.api_keys)
        self.server = Server(self._answer, options.limits, self._is_let_in if self._keys else None)
        self.server.refused = self._note_refusal

    # -- life

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound socket; engines without a hook are spoken for from now on."""
        self.bookings.start()
        for target in self.targets:
            target.stand_in.start()
        await self.server.start(sock, **front_door(self.options))
        self._gauging = asyncio.create_task(self._gauge())

    async def wait_for_ranks(self, within_s: float) -> None:
        """Wait until every engine without a hook has been joined, or the time has passed: it serves in either case."""
        deadline = time.monotonic() + within_s
        while not all(target.stand_in.has_joined for target in self.targets) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def drain(self) -> None:
        """From now on /readyz says that the end comes; requests are served, each as the last on its connection."""
        self.server.draining = True

    async def stop(self) -> None:
        """Take no more requests, let those under way end within the limit, release what is left, and close."""
        cut_off = await self.server.stop(self.options.stop_s)
        if cut_off:
            log.warning("pool=%s %d connections cut off at the end", self.settings.pool, cut_off)
        for target in self.targets:
            await target.stand_in.stop()
            target.pool.close()
        await end([self._gauging])
        await self.bookings.stop()
        self.metrics.settle()
        self.tokens.close()

    # -- requests

    async def _answer(self, client: Client, request: Inbound) -> None:
        path = request.path
        if path in (b"/healthz", b"/readyz"):
            return client.respond(request, *self._health(path))
        if self._keys and not self._is_let_in(request):
            self._note_refusal(request, 401)
            return client.respond(request, 401, *complaint(401, "no valid API key", "invalid_api_key", path))
        if path == b"/metrics":
            return client.respond(request, *self._metrics())
        if path.startswith(decision.PREFIX):
            return client.respond(request, *await self._decide(request))
        if not request.target.startswith(b"/") and request.target != b"*":
            self._note_refusal(request, 400)
            return client.respond(request, 400, *complaint(400, "a path is wanted", "invalid_target"))
        await Exchange(self, client, request).run()

    async def _decide(self, request: Inbound) -> decision.Answered:
        entry = self._entry(request)
        try:
            answered = await decision.decide(self, request, entry)
        except Exception:
            self._note(entry, decision.endpoint_of(request.path), 500, "defect")
            raise
        status = answered[0]
        self._note(entry, decision.endpoint_of(request.path), status, "whole" if status < 400 else "refused")
        return answered

    def _note_refusal(self, request: Inbound, status: int) -> None:
        """What was turned away before an exchange began."""
        entry = self._entry(request)
        self._note(entry, entry.path if is_placed(request.method, request.path) else "other", status, "refused")

    def _entry(self, request: Inbound) -> Entry:
        name = safe_request_id(request.header(b"x-request-id")) or ""
        return Entry(name, request.method, request.path.decode("latin-1"), request.received or time.monotonic())

    def _note(self, entry: Entry, endpoint: str, status: int, ended: str) -> None:
        """What was answered without an exchange, in the access log and the metrics as the others are."""
        self.metrics.answered(endpoint, status)
        if self.options.access_log:
            entry.status, entry.ended = status, ended
            entry.write()

    def _is_let_in(self, request: Inbound) -> bool:
        given = request.header(b"authorization")
        if given is None:
            given = request.header(b"x-api-key")  # Anthropic's clients
        else:
            scheme, _, given = given.partition(b" ")
            given = given.lstrip(b" ") if scheme.lower() == b"bearer" else None
        return given is not None and any(hmac.compare_digest(given, key) for key in self._keys)

    def _health(self, path: bytes) -> tuple[int, Headers, bytes]:
        reachable = sum(target.stand_in.answers for target in self.targets)
        away = self.bookings.dispatcher.is_falling_back
        stopping = self.server.draining or self.server.stopping
        ready = path == b"/healthz" or (reachable > 0 and not stopping)
        may_not_place = not self.bookings.is_rank_known and not (away and self.options.redis_away == "engine")
        if path == b"/readyz" and may_not_place:
            ready = False
        fields = {
            "status": "ok" if ready else "stopping" if stopping else "not_ready",
            "pool": self.settings.pool,
            "engines": len(self.targets),
            "engines_answering": reachable,
            "redis": "away" if away else "ok",
            "stopping": stopping,
        }
        return (200 if ready else 503), [_JSON], orjson.dumps(fields)

    async def _gauge(self) -> None:
        """Whichever worker is asked answers for all: each keeps its own samples up to date."""
        while True:
            self._set_gauges()
            self.metrics.settle()
            await asyncio.sleep(_GAUGE_S)

    def _set_gauges(self) -> None:
        self.metrics.fallback.set(int(self.bookings.dispatcher.is_falling_back))
        self.metrics.connections.set(len(self.server.clients))

    def _metrics(self) -> tuple[int, Headers, bytes]:
        self._set_gauges()
        return 200, [(b"Content-Type", CONTENT_TYPE)], self.metrics.text()
