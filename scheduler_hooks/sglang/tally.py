"""How many requests the pool placed and how many it left to SGLang, told in one line now and then: a fallback that
nobody counts is a fallback that nobody mends."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("scheduler_hooks.sglang")

TELL_S = 60.0
"""Least time between two lines, but for the end of an outage, which is told at once."""


class Tally:
    """Requests since the last line, by what became of them. Says nothing while the pool places all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_s = clock()
        self._placed = 0
        self._left: Counter[str] = Counter()
        self._was_away = False

    def placed(self) -> None:
        """The pool has placed one."""
        self._placed += 1

    def left(self, why: str, requests: int = 1) -> None:
        """SGLang's own method places these."""
        self._left[why] += requests

    def tell(self, is_away: bool) -> None:
        """After each dispatch; `is_away`: whether Redis is taken to be away."""
        is_back = self._was_away and not is_away
        self._was_away = is_away
        if not self._left or not (is_back or self._clock() - self._told_s >= TELL_S):
            return
        left = self._left.total()
        reasons = ", ".join(f"{count} {why}" for why, count in self._left.most_common())
        log.info("of the last %d requests SGLang's own method placed %d: %s", self._placed + left, left, reasons)
        self._told_s = self._clock()
        self._placed = 0
        self._left.clear()
