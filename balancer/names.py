"""Names of hosts to addresses within a time limit, which the system's resolver does not know.

A name server that is gone, or that has never heard of a server that is gone, takes seconds to be given up: longer than
any budget, and on a thread that nobody can interrupt. So each look-up has its own thread, shared by all who ask for the
name, and whoever asks waits as long as it can afford. One that takes long is not waited for by those who come later:
the name may be known again by then. `connection` asks; nothing is remembered, for addresses change.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

Look = Callable[[str], list[str]]

_LONG_S = 0.5
"""Age at which a look-up is left to itself. A resolver gives up after some 5 to 30 s, so threads do not pile up."""


def _resolve(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Names:
    """Look-ups under way. Thread-safe; `look` finds a name's addresses, or raises OSError."""

    def __init__(self, look: Look = _resolve) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[float, Future[list[str]]]] = {}
        # A forked child has none of its parent's threads, and perhaps a lock that one of them held.
        os.register_at_fork(after_in_child=self._forget)

    def addresses(self, host: str, within_s: float) -> list[str]:
        """A name's addresses, or the address that it is. Raises TimeoutError, or OSError where there is none."""
        return [host] if _is_address(host) else self._asked(host).result(within_s)

    async def addresses_async(self, host: str, within_s: float) -> list[str]:
        """As `addresses`, without holding up the event loop or one of its few threads."""
        if _is_address(host):
            return [host]
        loop, lookup = asyncio.get_running_loop(), self._asked(host)
        ended = asyncio.Event()

        def wake(_: object) -> None:
            with suppress(RuntimeError):  # an answer that comes after the loop has closed is nobody's
                loop.call_soon_threadsafe(ended.set)

        lookup.add_done_callback(wake)
        async with asyncio.timeout(within_s):
            await ended.wait()
        return lookup.result()

    def _asked(self, host: str) -> Future[list[str]]:
        with self._lock:
            began_s, lookup = self._under_way.get(host, (0.0, None))
            if lookup is None or time.monotonic() - began_s > _LONG_S:
                lookup = Future()
                self._under_way[host] = time.monotonic(), lookup
                threading.Thread(target=self._run, args=(host, lookup), name=f"look up {host}", daemon=True).start()
            return lookup

    def _run(self, host: str, lookup: Future[list[str]]) -> None:
        try:
            found, problem = self._look(host), None
        except Exception as error:
            found, problem = [], error
        with self._lock:
            if self._under_way.get(host, (0.0, None))[1] is lookup:
                del self._under_way[host]
        if problem is not None:
            lookup.set_exception(problem)
        else:
            lookup.set_result(found)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._under_way = {}


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return True
    return False
