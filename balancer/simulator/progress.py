"""A progress bar on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 32
_EVERY_S = 0.1


class ProgressBar:
    """Redrawn in place, at most ten times a second; `end` clears the line."""

    def __init__(self, what: str, unit: str = "requests", stream: TextIO | None = None) -> None:
        self._what, self._unit, self._stream = what, unit, stream or sys.stderr
        self._is_shown = self._stream.isatty()
        self._drawn_s = 0.0

    def tell(self, done: int, total: int) -> None:
        """`done` of `total` units."""
        now_s = time.monotonic()
        if not self._is_shown or now_s - self._drawn_s < _EVERY_S:
            return
        self._drawn_s = now_s
        full = _WIDTH * done // max(total, 1)
        bar = "#" * full + "." * (_WIDTH - full)
        self._stream.write(f"\r{self._what} [{bar}] {done:,} of {total:,} {self._unit}")
        self._stream.flush()

    def end(self) -> None:
        """Leave a clean line."""
        if self._is_shown and self._drawn_s:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
