"""What a dispatcher knows when Redis is away: the last loads it saw, and what it has dispatched itself since.

The rule of the fallback: least loaded by that knowledge while it is young enough to mean something, after that round
robin over the same ranks. The loads come with a dispatch's own answer (at most once per `refresh_ms`), so that knowing
them costs no round trip and no thread. Thread-safe; the clock is an argument.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from balancer.model import Scope
from balancer.protocol import ANYWHERE

REFRESH_MS = 1_000
TRUST_MS = 30_000


class LastKnown:
    """Loads in tokens by rank, as last seen, plus this dispatcher's own dispatches since."""

    def __init__(
        self,
        refresh_ms: int = REFRESH_MS,
        trust_ms: int = TRUST_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._refresh_s, self._trust_s, self._clock = refresh_ms / 1000, trust_ms / 1000, clock
        self._lock = threading.Lock()
        self._loads: dict[str, int] = {}
        self._ranks: list[str] = []
        self._learned = float("-inf")
        self._asked = float("-inf")
        self._turn = 0

    def wants_loads(self) -> bool:
        """Whether the next dispatch should bring the loads along: once per `refresh_ms`, and while none are known.

        A dispatcher that knows nothing has nothing to fall back on, so it does not wait a second after a dispatch that
        failed, or that found the pool empty.
        """
        now = self._clock()
        if self._ranks and now - self._asked < self._refresh_s:
            return False
        self._asked = now
        return True

    def learn(self, loads: Mapping[str, int]) -> None:
        """The loads of all eligible ranks, fresh from Redis. An empty pool teaches nothing."""
        if not loads:
            return
        with self._lock:
            self._loads = dict(loads)
            self._ranks = sorted(loads)
            self._learned = self._clock()

    def add(self, rank: str, tokens: int) -> None:
        """This dispatcher has sent `tokens` to `rank`."""
        with self._lock:
            if rank in self._loads:
                self._loads[rank] += tokens

    def choose(self, tokens: int, scope: Scope = ANYWHERE) -> tuple[str, int] | None:
        """A rank within `scope` and its load as far as known, with `tokens` now added to it.

        None where no such rank was ever seen.
        """
        with self._lock:
            ranks = self._ranks if scope == ANYWHERE else [rank for rank in self._ranks if scope.allows(rank)]
            if not ranks:
                return None
            # Rotating where the search begins spreads ties.
            self._turn = (self._turn + 1) % len(ranks)
            order = ranks[self._turn :] + ranks[: self._turn]
            young = self._clock() - self._learned < self._trust_s
            rank = min(order, key=self._loads.__getitem__) if young else order[0]
            load = self._loads[rank]
            self._loads[rank] += tokens
            return rank, load
