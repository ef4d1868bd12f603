"""Requests as they come in: bytes to whole requests, within limits, over llhttp (`httptools`). No I/O.

llhttp is strict: two lengths, a length beside chunks, a bad chunk, a folded or torn header are no HTTP. What is not
taken is left in `refusal`; after that nothing more is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import httptools

from balancer.serve.options import Limits
from balancer.serve.wire import Headers

_MOST_HEADERS = 256
_LOOKED_AT = frozenset((b"content-length", b"transfer-encoding", b"host", b"expect"))


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
        self.refusal: tuple[int, str, str | None] | None = None
        self._limits, self._all_held, self._on_expect, self._lets_in = limits, held, on_expect, lets_in
        self._parser = httptools.HttpRequestParser(self)
        self._request = Inbound()
        self._refused: Inbound | None = None
        self._body = bytearray()  # no list of pieces: a client could send them of two bytes
        self._head_bytes = 0  # of a head or a trailer: since the request's first byte or its body's last piece
        self._in_head = True
        self._held = 0

    @property
    def request(self) -> Inbound:
        """The one refused, else the one being read; its method and path are empty where its head is not whole."""
        return self._refused or self._request

    @property
    def is_reading(self) -> bool:
        """Whether a request has begun and is not yet whole."""
        return self._head_bytes > 0 or not self._in_head

    def feed(self, data: bytes) -> bytes:
        """Read on; returns bytes that follow a request which asked for another protocol, and gets this one."""
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parser = httptools.HttpRequestParser(self)
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self.refuse(400, f"not HTTP/1.1: {str(error)[:100]}")
        if self._head_bytes > self._limits.head:
            self.refuse(431, f"more than {self._limits.head} bytes of headers")
        return b""

    def refuse(self, status: int, why: str, code: str | None = None) -> None:
        """Take nothing more; the first reason counts."""
        if self.refusal is None:
            self.refusal = status, why, code
            self._refused = self._request

    def free(self, request: Inbound) -> None:
        """A request has been answered: its body is held no more."""
        freed = min(self._held, request.held)
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
        self._body = bytearray()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """The target, perhaps in pieces."""
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; a trailer of a request goes no further."""
        if self._in_head:
            self._request.add(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: refuse early what will not be taken."""
        request, parser = self._request, self._parser
        self._in_head, self._head_bytes = False, 0
        request.method = parser.get_method().decode()
        version = parser.get_http_version()
        request.is_http_10 = version == "1.0"
        request.keep_alive = parser.should_keep_alive()
        request.path = request.target.partition(b"?")[0]
        if version not in ("1.0", "1.1"):
            return self.refuse(505, "this server speaks HTTP/1.1")
        if request.method == "CONNECT":
            return self.refuse(501, "CONNECT is not served here")
        if len(request.headers) > _MOST_HEADERS:
            return self.refuse(431, f"more than {_MOST_HEADERS} headers")
        self._read_headers(request)
        return None

    def _read_headers(self, request: Inbound) -> None:
        hosts, expects, size, sends = 0, False, len(request.target), False
        for name, value in request.headers:
            size += len(name) + len(value)
            if (low := name.lower()) not in _LOOKED_AT:
                continue
            if low == b"content-length":
                request.has_body = True
                sends = int(value) > 0
                if int(value) > self._limits.body:
                    return self.refuse(413, f"the body is larger than {self._limits.body} bytes")
            elif low == b"transfer-encoding":
                request.has_body = sends = True
                if value.lower() != b"chunked" or request.is_http_10:
                    return self.refuse(501, "the only transfer coding taken is chunked, of HTTP/1.1")
            elif low == b"host":
                hosts += 1
            else:
                expects = value.lower() == b"100-continue"
        if size > self._limits.head:
            return self.refuse(431, f"more than {self._limits.head} bytes of headers")
        if hosts > 1 or (hosts == 0 and not request.is_http_10):
            return self.refuse(400, "a request names one Host")
        if sends and self._lets_in is not None and not self._lets_in(request):
            return self.refuse(401, "no valid API key", "invalid_api_key")
        if expects and not self.ready:
            self._on_expect()
        return None

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._head_bytes = 0
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
        request = self._request
        request.body, request.held = bytes(self._body), len(self._body)
        request.received = time.monotonic()
        self._body = bytearray()
        self._in_head, self._head_bytes = True, 0
        self._request = Inbound()
        if self.refusal is None:
            self.ready.append(request)
