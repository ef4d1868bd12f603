"""The connections to an engine: one pool for each address, kept alive, TCP_NODELAY."""

from __future__ import annotations

import asyncio
import errno
import ssl
import time
from collections import deque

from balancer.serve.answer import UpstreamError
from balancer.serve.options import Engine
from balancer.serve.upstream import Connection

_MOST_KEPT = 512
"""Idle connections kept for one engine."""
_KEPT_S = 4.0
"""Shorter than what engines keep idle connections for (uvicorn: 5 s)."""


class Pool:
    """The connections to one engine."""

    def __init__(self, engine: Engine, connect_s: float, tls: ssl.SSLContext | None = None) -> None:
        self.engine = engine
        self._connect_s = connect_s
        self._tls = tls
        self._idle: deque[Connection] = deque()

    async def acquire(self, fresh: bool = False) -> tuple[Connection, bool]:
        """A connection, and whether it has served before (then the engine may be about to close it)."""
        now = time.monotonic()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.transport.is_closing():
                continue
            if now - connection.idle_since > _KEPT_S:
                connection.transport.abort()
                continue
            return connection, True
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, made = await loop.create_connection(
                    lambda: Connection(self),
                    self.engine.host,
                    self.engine.port,
                    ssl=self._tls,
                    server_hostname=self.engine.host if self._tls else None,
                )
        except TimeoutError:
            raise UpstreamError(f"no connection within {self._connect_s} s", False, is_late=True) from None
        except OSError as error:
            is_ours = error.errno in (errno.EMFILE, errno.ENFILE)
            raise UpstreamError(f"no connection: {error.strerror or error}", False, is_ours=is_ours) from None
        return made, False

    def keep(self, connection: Connection) -> None:
        """For another exchange."""
        if len(self._idle) >= _MOST_KEPT:
            connection.transport.close()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> int:
        """End those that nobody uses; how many there were."""
        kept = len(self._idle)
        while self._idle:
            self._idle.pop().transport.close()
        return kept
