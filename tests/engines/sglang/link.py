"""The way from an engine to Redis, in a test's hand: open, cut (reset), or a black hole (no answer, no reset)."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class Link:
    """Forwards a port of its own to Redis' port, until told otherwise."""

    def __init__(self, redis_port: int, port: int = 0) -> None:
        self.redis_port = redis_port
        self._is_hole = threading.Event()
        self._is_cut = threading.Event()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def black_hole(self) -> None:
        """Take everything, answer nothing."""
        self._is_hole.set()

    def cut(self) -> None:
        """Reset every connection, and each new one at once."""
        self._is_cut.set()
        for one in list(self._open):
            _shut(one)

    def mend(self) -> None:
        """As before; connections made meanwhile are reset."""
        self._is_cut.clear()
        if self._is_hole.is_set():
            self._is_hole.clear()
            for one in list(self._open):
                _shut(one)

    def lead_to(self, redis_port: int) -> None:
        """From now on to another Redis; open connections are reset."""
        self.redis_port = redis_port
        for one in list(self._open):
            _shut(one)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut.is_set():
                one.close()
                continue
            threading.Thread(target=self._carry, args=(one,), daemon=True).start()

    def _carry(self, one: socket.socket) -> None:
        try:
            other = socket.create_connection(("127.0.0.1", self.redis_port), timeout=5)
        except OSError:
            one.close()
            return
        pair = {one: other, other: one}
        self._open |= set(pair)
        try:
            while True:
                for ready in select.select(list(pair), [], [], 0.5)[0]:
                    data = ready.recv(65_536)
                    if not data:
                        return
                    if not self._is_hole.is_set():
                        pair[ready].sendall(data)
        except OSError:
            return
        finally:
            for end in pair:
                self._open.discard(end)
                end.close()


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
