"""Requests as they come in: bytes to whole requests, within limits, over llhttp (`httptools`). No I/O.

llhttp is strict: two lengths, a length beside chunks, a bad chunk, a folded or torn header are no HTTP. What is not
taken is left in `refusal`; after that nothing more is read. A request that would rather speak another protocol
(`Upgrade: h2c`, as Java's HttpClient asks of every http:// address) is read as HTTP/1.1, body and all (RFC 9110, 7.8).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import httptools

from balancer.serve.endpoints import origin_form, path_of
from balancer.serve.options import Limits
from balancer.serve.wire import Headers

_MOST_HEADERS = 256
_LOOKED_AT = frozenset((b"content-length", b"transfer-encoding", b"host", b"expect", b"upgrade"))
_SLICE = 4096
"""The parser gets so many bytes at a time, beyond what is known to be a body: it cannot be stopped, and the smallest
request has 26."""


class Inbound:
    """One request, read whole."""

    __slots__ = (
        "_first",
        "body",
        "has_body",
        "headers",
        "held",
        "is_http_10",
        "keep_alive",
        "method",
        "path",
        "received",
        "target",
    )

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.path = b""
        self.headers: Headers = []
        self._first: dict[bytes, bytes] = {}
        self.body = b""
        self.held = 0  # bytes of the body that the limit on all bodies counts, also when it is not kept any more
        self.has_body = False
        self.is_http_10 = False
        self.keep_alive = True
        self.received = 0.0

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return self._first.get(name)

    def add(self, name: bytes, value: bytes) -> None:
        """One more header, as it came."""
        self.headers.append((name, value))
        self._first.setdefault(name.lower(), value)


class HeldBytes:
    """Bytes of request bodies that a server holds at this moment."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0


class RequestReader:
    """Reads the requests of one connection; whole ones stand in `ready`. Its `on_` methods are the parser's."""

    def __init__(
        self,
        limits: Limits,
        held: HeldBytes,
        on_expect: Callable[[], None],
        lets_in: Callable[[Inbound], bool] | None = None,
    ) -> None:
        self.ready: deque[Inbound] = deque()
        self.is_reading = False
        """Whether a request has begun and is not yet whole. Line breaks before one begin none (RFC 9112, 2.2)."""
        self.refusal: tuple[int, str, str | None] | None = None
        self._limits, self._all_held, self._on_expect, self._lets_in = limits, held, on_expect, lets_in
        self._parser = httptools.HttpRequestParser(self)
        self._request = Inbound()
        self._refused: Inbound | None = None
        self._body = bytearray()  # no list of pieces: a client could send them of two bytes
        self._head_bytes = 0  # of a head or a trailer: since the request's first byte or its body's last piece
        self._body_left = 0  # where the head told the body's length
        self._in_head = True
        self._framing = b""  # of a request that asks for another protocol: the header that says where its body ends
        self._is_primed = False
        self._held = 0

    @property
    def request(self) -> Inbound:
        """The one refused, else the one being read; its method and path are empty where its head is not whole."""
        return self._refused or self._request

    def feed(self, data: bytes) -> bytes:
        """Read on until a request is whole or refused; returns the bytes that are left for later."""
        at = self._feed(data) if len(data) <= max(_SLICE, self._body_left) else 0
        while at < len(data) and not self.ready and self.refusal is None:
            at += self._feed(memoryview(data)[at : at + max(_SLICE, self._body_left)])
        return data[at:]

    def _feed(self, data: bytes | memoryview) -> int:
        """Give bytes to the parser; returns how many it took: no more than the head of a request to upgrade."""
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            return int(upgrade.args[0])
        except httptools.HttpParserError as error:
            self.refuse(400, f"not HTTP/1.1: {str(error)[:100]}")
        if self._head_bytes > self._limits.head:
            if (request := self._request).target and not request.method:  # for the log: the head has no end
                request.method, request.path = self._parser.get_method().decode(), path_of(request.target)
            self.refuse(431, f"more than {self._limits.head} bytes of headers")
        return len(data)

    def _decline_upgrade(self) -> None:
        """The parser takes what follows for another protocol: a fresh one is told where the body ends, and goes on."""
        self._parser = httptools.HttpRequestParser(self)
        framing, self._framing = self._framing, b""
        if framing and self.refusal is None:
            self._is_primed = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
            self._is_primed = False

    def refuse(self, status: int, why: str, code: str | None = None) -> None:
        """Take nothing more; the first reason counts."""
        if self.refusal is None:
            self.refusal = status, why, code
            self._refused = self._request

    def free(self, request: Inbound) -> None:
        """A request's body is held no more: it has been sent on, or answered. Once is enough."""
        freed, request.held = min(self._held, request.held), 0
        self._held -= freed
        self._all_held.total -= freed

    def close(self) -> None:
        """The connection has ended."""
        self._all_held.total -= self._held
        self._held = 0
        self._body = bytearray()
        self.ready.clear()
        self.refuse(0, "closed")

    # -- what the parser calls

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if self._is_primed:
            return
        self._body = bytearray()
        self._in_head = self.is_reading = True

    def on_url(self, url: bytes) -> None:
        """The target, perhaps in pieces."""
        if not self._is_primed:
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; a trailer of a request goes no further."""
        if self._in_head:
            self._request.add(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: refuse early what will not be taken."""
        if self._is_primed:
            return None
        request, parser = self._request, self._parser
        self._in_head, self._head_bytes = False, 0
        request.method = parser.get_method().decode()
        version = parser.get_http_version()
        request.is_http_10 = version == "1.0"
        request.keep_alive = parser.should_keep_alive()
        if not request.target.startswith(b"/"):
            request.target = origin_form(request.target)
        request.path = path_of(request.target)
        if version not in ("1.0", "1.1"):
            return self.refuse(505, "this server speaks HTTP/1.1")
        if request.method == "CONNECT":
            return self.refuse(501, "CONNECT is not served here")
        if len(request.headers) > _MOST_HEADERS:
            return self.refuse(431, f"more than {_MOST_HEADERS} headers")
        self._read_headers(request)
        return None

    def _read_headers(self, request: Inbound) -> None:
        hosts, expects, size, sends, length, framing, upgrades = 0, False, len(request.target), False, 0, b"", b""
        for name, value in request.headers:
            size += len(name) + len(value)
            if (low := name.lower()) not in _LOOKED_AT:
                continue
            if low == b"content-length":
                request.has_body = True
                length = int(value)
                sends, framing = length > 0, b"Content-Length: %d" % length
                if length > self._limits.body:
                    return self.refuse(413, f"the body is larger than {self._limits.body} bytes")
            elif low == b"transfer-encoding":
                request.has_body = sends = True
                framing = b"Transfer-Encoding: chunked"
                if value.lower() != b"chunked" or request.is_http_10:
                    return self.refuse(501, "the only transfer coding taken is chunked, of HTTP/1.1")
            elif low == b"host":
                hosts += 1
            elif low == b"upgrade":
                upgrades += value.lower() + b","
            else:
                expects = value.lower() == b"100-continue"
        if size > self._limits.head:
            return self.refuse(431, f"more than {self._limits.head} bytes of headers")
        if hosts > 1 or (hosts == 0 and not request.is_http_10):
            return self.refuse(400, "a request names one Host")
        if sends and self._lets_in is not None and not self._lets_in(request):
            return self.refuse(401, "no valid API key", "invalid_api_key")
        if self._parser.should_upgrade():  # the parser's word alone: it is the parser that reads no body then
            if b"websocket" in upgrades:
                return self.refuse(501, "no WebSocket passes through balancer serve: connect to an engine's address")
            self._framing = framing if sends else b""
        self._body_left = length
        if expects and not self.ready:
            self._on_expect()
        return None

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._head_bytes = 0
        self._body_left -= len(data)
        if self.refusal is not None:
            return
        self._body += data
        self._held += len(data)
        self._all_held.total += len(data)
        if len(self._body) > self._limits.body:
            self.refuse(413, f"the body is larger than {self._limits.body} bytes")
        elif self._all_held.total > self._limits.bodies:
            self.refuse(503, "this replica holds all the request bodies it may hold")

    def on_message_complete(self) -> None:
        """A request is whole."""
        if self._framing:  # its head is: the body comes by the next parser
            return
        request = self._request
        request.body, request.held = bytes(self._body), len(self._body)
        request.received = time.monotonic()
        self._body = bytearray()
        self.is_reading = False
        self._in_head, self._head_bytes, self._body_left = True, 0, 0
        self._request = Inbound()
        if self.refusal is None:
            self.ready.append(request)
