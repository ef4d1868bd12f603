"""Trouble that repeats every step is logged once and counted always: a log at 50 lines a second helps nobody."""

from __future__ import annotations

import logging
from collections import Counter


class Once:
    """Logs the first trouble of each kind to `log`; `counts` has them all, by kind."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, message: str, *arguments: object, times: int = 1, level: int = logging.WARNING) -> None:
        """Count `times` troubles of this kind; the first call logs `message` (printf-style) with its arguments."""
        is_first = kind not in self.counts
        self.counts[kind] += times
        if is_first:
            self._log.log(level, message + " (logged once, counted from now on)", *arguments)
