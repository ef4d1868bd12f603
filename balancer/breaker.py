"""The breaker: while Redis is away, one call at a time tries it, and no oftener than every `probe_ms`.

So an outage costs one budget per probe and not one per request. Thread-safe; the clock is an argument.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed (all calls pass) until `opens_after` calls in a row have failed; then open until a probe succeeds.

    More than one where the budget is so small that a healthy Redis misses it now and then.
    """

    def __init__(self, probe_ms: int, clock: Callable[[], float] = time.monotonic, opens_after: int = 1) -> None:
        self._probe_s = probe_ms / 1000
        self._clock = clock
        self._opens_after = opens_after
        self._failures = 0
        self._lock = threading.Lock()
        self._next_probe: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether Redis is taken to be away."""
        return self._next_probe is not None

    def admits(self) -> bool:
        """Whether this call may go to Redis; while open, True makes the caller the probe."""
        with self._lock:
            if self._next_probe is None:
                return True
            if self._clock() < self._next_probe:
                return False
            self._next_probe = self._clock() + self._probe_s
            return True

    def failed(self) -> bool:
        """A call has failed; returns True where that opens the breaker."""
        with self._lock:
            self._failures += 1
            opens = self._next_probe is None
            if opens and self._failures < self._opens_after:
                return False
            self._next_probe = self._clock() + self._probe_s
            return opens

    def succeeded(self) -> bool:
        """A call has succeeded; returns True where that closes the breaker."""
        with self._lock:
            closes = self._next_probe is not None
            self._next_probe = None
            self._failures = 0
            return closes
