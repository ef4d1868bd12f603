"""One request's way: read what it asks for, place it, send it, pass the answer on, end its booking.

Until the first byte of the answer's body another rank or engine may be tried, within the retry budget; after it, what
happens is passed on as it is: a broken answer breaks off at the client too.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from balancer.errors import BalancerError, NoRank, NoRankReason
from balancer.model import Outcome, Placement
from balancer.serve import wire
from balancer.serve.access_log import Entry
from balancer.serve.answer import Answer, UpstreamError
from balancer.serve.bookings import Open
from balancer.serve.complaint import complaint, status_of
from balancer.serve.desk import Desk, Target
from balancer.serve.endpoints import Asked, Malformed, is_placed
from balancer.serve.front import Client
from balancer.serve.ids import booking_id
from balancer.serve.inbound import Inbound
from balancer.serve.relay import LAST_PIECES, prompt_tokens, sink
from balancer.serve.tokens import Counted
from balancer.serve.upstream import Connection

log = logging.getLogger("balancer.serve")

_TRY_ELSEWHERE = frozenset((502, 503))
"""What an engine that starts, stops or is broken answers, before it has done anything."""
_REPEATABLE = frozenset(("GET", "HEAD", "OPTIONS"))
_NOTHING_ASKED, _UNCOUNTED = Asked(), Counted(1, "none")


@dataclass(slots=True)
class _Try:
    """One attempt: where to, and with which booking."""

    target: Target
    index: int | None
    placement: Placement | None = None


class Exchange:
    """A request and its answer."""

    def __init__(self, desk: Desk, client: Client, request: Inbound) -> None:
        self._desk = desk
        self._client = client
        self._request = request
        own = wire.safe_request_id(request.header(b"x-request-id"))
        self._booking_id = booking_id(own)
        self._request_id = own or self._booking_id
        trace = request.header(b"traceparent")
        self.entry = Entry(
            self._request_id,
            request.method,
            request.path.decode("latin-1"),
            request.received,
            trace=trace[3:35].decode("latin-1") if trace and len(trace) >= 35 else "",
        )
        self._asked, self._counted = _NOTHING_ASKED, _UNCOUNTED
        self._placed = is_placed(request.method, request.path)
        # Of what passes through, an upload or a deletion that an engine may have had is not sent again.
        self._may_repeat = self._placed or request.method in _REPEATABLE
        self._opened: Open | None = None
        self._booked = False
        self._is_acknowledged = False
        self._last: deque[bytes] = deque(maxlen=LAST_PIECES)

    async def run(self) -> None:
        """Answer the request. Cancelled when the client goes, or is cut off."""
        entry, metrics = self.entry, self._desk.metrics
        metrics.in_flight += 1
        try:
            await self._answer()
        except Exception:
            entry.status, entry.ended = entry.status or 500, "defect"
            raise
        except asyncio.CancelledError:
            entry.ended = "cut_by_us" if self._client.is_cut else "client_gone"
            if not self._client.is_cut:
                metrics.gone()
            raise
        finally:
            if self._booked:
                self._desk.bookings.end(self._booking_id, is_urgent=not self._is_acknowledged)
            metrics.in_flight -= 1
            metrics.answered(entry.path if self._placed else "other", entry.status)
            metrics.observe(metrics.duration, time.monotonic() - entry.began)
            if self._desk.options.access_log:
                entry.write()

    async def _answer(self) -> None:
        desk = self._desk
        if self._placed:
            try:
                await self._read()
            except Malformed as error:
                return self._refuse(400, str(error), "invalid_body")
        desk.retries.earn()
        failed: set[str] = set()
        attempt: _Try | None = None
        why, reason = UpstreamError("", False), ""
        for number in range(desk.options.tries):
            try:
                attempt = await self._choose(tuple(sorted(failed)))
            except NoRank as error:
                if failed:
                    break
                desk.metrics.decided("", error.reason.value)
                return self._refuse(status_of(error), str(error), error.reason.value)
            except BalancerError as error:
                log.warning("request=%s cannot be placed: %s", self._request_id, error)
                return self._refuse(503, "the dispatcher's store refuses to place requests", "store_refused")
            self.entry.tries = number + 1
            if reason:
                desk.metrics.retried(reason)
                reason = ""
            is_last = number + 1 == desk.options.tries
            try:
                connection, answer = await self._send(attempt)
            except UpstreamError as error:
                if error.is_ours:
                    if desk.close_kept() and not is_last:
                        await self._unbook()
                        continue
                    log.warning("request=%s cannot be sent: %s", self._request_id, error)
                    return self._refuse(503, "this replica has no more open files", "no_open_files")
                why = error
                attempt.target.stand_in.suspect(is_certain=not error.connected)
                failed.update(attempt.target.engine.ranks)
                log.info("request=%s engine=%s failed: %s", self._request_id, attempt.target.engine.url, error)
                if (
                    is_last
                    or (error.connected and not self._may_repeat)
                    or not desk.has_untried(failed)
                    or not desk.retries.spend()
                ):
                    break
                reason = "broke_off" if error.connected else "no_connection"
                await self._unbook()
                continue
            if (
                answer.status in _TRY_ELSEWHERE
                and self._may_repeat
                and not is_last
                and desk.has_other(failed.union(attempt.target.engine.ranks))
                and desk.retries.spend()
            ):
                reason = f"status_{answer.status}"
                why = UpstreamError(f"the engine answered {answer.status}", True)
                failed.update(attempt.target.engine.ranks)
                connection.give_back()
                await self._unbook()
                continue
            return await self._pass_on(attempt, connection, answer)
        message = (
            f"no engine answered in {self.entry.tries} tries: {why}"
            if self.entry.tries > 1
            else f"the engine failed: {why}"
        )
        return self._refuse(504 if why.is_late else 502, message, "engine_failed")

    # -- before it is sent

    async def _read(self) -> None:
        request, counter = self._request, self._desk.tokens
        path = request.path
        self._asked, self._counted = counter.of_compressed(path, request) or await counter.read(path, request.body)
        if self._asked.rid and self._desk.takes_rids:
            self._booking_id = self._asked.rid
        self.entry.tokens, self.entry.tokens_from = self._counted.tokens, self._counted.source

    async def _choose(self, failed: tuple[str, ...]) -> _Try:
        """Where to send it; raises `NoRank`."""
        desk, entry = self._desk, self.entry
        if not self._placed:
            target = desk.any_target(failed)
            entry.engine = target.engine.name
            return _Try(target, None)
        lets_engine_choose = desk.options.redis_away == "engine"
        self._booked = True
        try:
            placement, target, index = await desk.place(self._booking_id, self._counted.tokens, failed)
        except NoRank as error:
            self._booked = False  # what Redis may have booked unheard, the dispatcher owes it
            if lets_engine_choose and error.reason is NoRankReason.UNREACHABLE:
                return self._unplaced(failed)
            raise
        if lets_engine_choose and placement.outcome is Outcome.FALLBACK:
            return self._unplaced(failed)
        entry.place(placement, target.engine.name)
        desk.metrics.decided(placement.rank, placement.outcome.value)
        if placement.outcome is Outcome.FALLBACK:
            self._booked = False
        else:
            self._opened = desk.bookings.watch(placement, is_counted=not target.engine.hooked)
        return _Try(target, index, placement)

    def _unplaced(self, failed: tuple[str, ...]) -> _Try:
        """Redis is away, and the operator would have the engine choose."""
        target = self._desk.any_target(failed)
        self.entry.engine, self.entry.outcome = target.engine.name, "engine_chooses"
        self._desk.metrics.decided("", "engine_chooses")
        return _Try(target, None)

    async def _unbook(self) -> None:
        """Before the same request is placed again."""
        if self._booked:
            self._opened = None
            await self._desk.bookings.end_now(self._booking_id)

    # -- sending and passing on

    async def _send(self, attempt: _Try) -> tuple[Connection, Answer]:
        """Send it, once more where a kept connection turns out to be closed; raises `UpstreamError`."""
        request, fresh = self._request, not self._may_repeat
        while True:
            connection, is_reused = await attempt.target.pool.acquire(fresh)
            try:
                # Its bytes are not kept beside the body from which they can be made again.
                told = connection.send(
                    self._bytes_for(attempt), request.method == "HEAD", self._desk.options.first_byte_s
                )
                answer = await told
            except UpstreamError as error:
                connection.give_back()
                if not is_reused or error.is_late or connection.has_begun:
                    raise
                fresh = True
            except BaseException:
                connection.give_back()
                raise
            else:
                return connection, answer

    def _bytes_for(self, attempt: _Try) -> bytes:
        request, engine = self._request, attempt.target.engine
        body, more = request.body, [(b"X-Request-Id", wire.id_header(engine, self._request_id))]
        if self._placed:
            more = [(b"X-Request-Id", wire.id_header(engine, self._booking_id if engine.hooked else self._request_id))]
            more += wire.rank_headers(engine, request.path, attempt.index)
            if self._asked.is_object:
                body = wire.body_for(engine, request.path, self._asked, self._booking_id, attempt.index, body)
        options = self._desk.options
        if options.engine_key:
            more.append((b"Authorization", b"Bearer " + options.engine_key.encode()))
        return (
            wire.request_head(
                engine,
                request.method,
                request.target,
                request.headers,
                more,
                len(body) if request.has_body else None,
                drop_authorization=bool(options.api_keys or options.engine_key),
            )
            + body
        )

    async def _pass_on(self, attempt: _Try, connection: Connection, answer: Answer) -> None:
        entry, client, request, desk = self.entry, self._client, self._request, self._desk
        client.let_go(request)  # it will not be sent again, and a stream may last for minutes
        entry.status, entry.first_byte = answer.status, time.monotonic()
        if answer.status < 500:
            attempt.target.stand_in.heard = entry.first_byte
        desk.metrics.observe(desk.metrics.first_byte, entry.first_byte - entry.began)
        if (
            self._booked
            and attempt.target.engine.hooked
            and not wire.can_match(attempt.target.engine, request.path, self._asked)
        ):
            # The engine has it, and its hook cannot know it by our id: its own count holds it from here on.
            self._booked = False
            self._opened = None
            desk.bookings.end(self._booking_id)
        is_open_ended = answer.length is None and not answer.is_chunked and request.method != "HEAD"
        unchunk = request.is_http_10 and answer.is_chunked
        if unchunk or (is_open_ended and answer.status not in (204, 304)):
            request.keep_alive = False
        head = self._head_for(attempt, answer, unchunk)
        client.on_pause, client.on_resume = connection.pause, connection.resume
        idle_s = desk.options.stream_idle_s
        try:
            if connection.has_more and not unchunk:  # its first bytes go out with the head: one write, one packet
                ended = connection.relay(self._sink(head), idle_s=idle_s)
            else:
                client.write(head)
                ended = connection.relay(self._sink(), plain=unchunk, idle_s=idle_s)
            await ended
        except UpstreamError as error:
            entry.ended = "cut"
            log.info("request=%s engine=%s broke off: %s", self._request_id, attempt.target.engine.url, error)
            if is_open_ended or unchunk:  # such an answer ends with its connection: a reset alone says that it is torn
                sock = client.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.abort()
            else:
                client.break_off()
        else:
            self._is_acknowledged = attempt.target.engine.hooked and answer.status < 400
            self._learn()
        finally:
            client.on_pause = client.on_resume = None
            connection.give_back()

    def _head_for(self, attempt: _Try, answer: Answer, unchunk: bool) -> bytes:
        more: wire.Headers = []
        if answer.header(b"x-request-id") is None:
            more.append((b"X-Request-Id", self._request_id.encode()))
        if self._desk.options.show_rank and attempt.placement is not None:
            more.append((b"X-Balancer-Rank", attempt.placement.rank.encode()))
        closes = self._client.closes_after(self._request)
        drop = frozenset((b"transfer-encoding", b"trailer")) if unchunk else frozenset[bytes]()
        if self._request.is_http_10 and not closes:
            more.append((b"Connection", b"keep-alive"))
        headers = answer.headers
        if answer.header(b"location"):
            headers = wire.without_address(attempt.target.engine, headers)
        return wire.answer_head(answer.status_line, headers, more, closes, drop)

    def _sink(self, head: bytes = b"") -> Callable[[bytes], None]:
        counted = self._opened if self._opened is not None and self._opened.is_counted else None
        return sink(self._client, self.entry, counted, self._last, head)

    def _learn(self) -> None:
        """The engine's own count of the prompt, where the answer tells it."""
        actual, counted = prompt_tokens(self._last), self._counted
        told = actual and self._placed and self.entry.status == 200
        if told and counted.source != "none" and self._asked.copies == 1:
            self._desk.metrics.counted(counted.source, counted.tokens, actual)
            if counted.text_bytes:
                self._desk.tokens.estimate.learn(counted.text_bytes, actual - self._asked.extra)

    def _refuse(self, status: int, message: str, code: str) -> None:
        self.entry.status, self.entry.ended = status, "refused"
        headers, body = complaint(status, message, code, self._request.path, self._request_id)
        self._client.respond(self._request, status, headers, body)
