"""The head of an engine's answer, and what is raised where none comes or it is none."""

from __future__ import annotations

from balancer.serve.wire import Headers


class UpstreamError(Exception):
    """The engine did not answer. `connected`: whether it had taken the connection; `is_late`: or not in time;
    `is_ours`: it was never asked, this process has no more open files."""

    def __init__(self, message: str, connected: bool, is_late: bool = False, is_ours: bool = False) -> None:
        super().__init__(message)
        self.connected = connected
        self.is_late = is_late
        self.is_ours = is_ours


class Answer:
    """An answer's head."""

    __slots__ = ("_first", "headers", "is_chunked", "length", "status", "status_line")

    def __init__(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        self.status_line = lines[0]
        if not lines[0].startswith(b"HTTP/1.") or not lines[0][9:12].isdigit():
            raise UpstreamError("the engine's answer is not HTTP/1.1", True)
        self.status = int(lines[0][9:12])
        self.headers: Headers = []
        self._first: dict[bytes, bytes] = {}
        self.length: int | None = None
        self.is_chunked = False
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            value = value.strip()
            low = name.lower()
            if not colon or not name or name[0] in b" \t":
                raise UpstreamError("the engine's answer has a broken header", True)
            if low == b"content-length":
                if not value.isdigit() or (self.length is not None and int(value) != self.length):
                    raise UpstreamError("the engine's answer has no clear length", True)
                self.length = int(value)
            elif low == b"transfer-encoding":
                self.is_chunked = value.lower().endswith(b"chunked")
            self.headers.append((name, value))
            self._first.setdefault(low, value)
        if self.is_chunked and self.length is not None:
            raise UpstreamError("the engine's answer has two lengths", True)

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return self._first.get(name)
