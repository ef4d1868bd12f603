"""What became of a dispatcher's requests: counts, answer times, and how long Redis did not place.

Pure but for the clock, which is an argument. Filled by `traffic`, shown in its log and as JSON at its end.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from balancer import Outcome
from scheduler_hooks.demo.measure import percentile

_MOST_TIMES = 100_000
_MOST_OUTAGES = 100


@dataclass(slots=True)
class Outage:
    """A time in which Redis placed nothing: from the first answer without it to the next one with it."""

    ms: float = 0.0
    requests: int = 0


@dataclass(slots=True)
class Tally:
    """All counts are of requests; each asked one is placed, repeated, fallback, no_rank or failed, and each placed,
    repeated or fallback one ends as finished, lost (its engine went away), rejected by its engine or not_sent."""

    clock: Callable[[], float] = time.monotonic
    asked: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    no_rank: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    outages: deque[Outage] = field(default_factory=lambda: deque(maxlen=_MOST_OUTAGES))
    _times_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_TIMES))
    _away_since: float | None = None

    @property
    def open(self) -> int:
        """Requests that have an answer and no end."""
        answered = sum(self.answers[outcome.value] for outcome in Outcome)
        return answered - self.ends.total()

    def answered(self, word: str, took_s: float) -> None:
        """A dispatch has ended in `word`: an outcome, no_rank or failed."""
        self.answers[word] += 1
        self._times_ms.append(took_s * 1e3)
        self.slowest_ms = max(self.slowest_ms, took_s * 1e3)
        if word in (Outcome.PLACED.value, Outcome.REPEATED.value):
            if self._away_since is not None:
                self.outages[-1].ms = (self.clock() - self._away_since) * 1e3
                self._away_since = None
        elif word != "no_rank":
            if self._away_since is None:
                self._away_since = self.clock() - took_s
                self.outages.append(Outage())
            self.outages[-1].requests += 1
            self.outages[-1].ms = (self.clock() - self._away_since) * 1e3

    def line(self) -> str:
        """For the log."""
        answers = ", ".join(f"{count:,} {word}" for word, count in self.answers.most_common()) or "none"
        ends = ", ".join(f"{count:,} {word}" for word, count in self.ends.most_common()) or "none"
        times = self.times_ms()
        return (
            f"answers: {answers}; ends: {ends}; {self.open:,} open; "
            f"dispatch p50 {times['p50']:.1f} p99 {times['p99']:.1f} max {times['max']:.1f} ms"
        )

    def times_ms(self) -> dict[str, float]:
        """How long dispatches took: median and 99th percentile of the last 100,000, and the slowest of all."""
        times = sorted(self._times_ms) or [0.0]
        return {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "max": self.slowest_ms}

    def as_json(self) -> dict[str, Any]:
        """Everything, with an outage that goes on counted up to its last request."""
        return {
            "asked": self.asked,
            "answers": dict(self.answers),
            "no_rank": dict(self.no_rank),
            "ends": dict(self.ends),
            "open": self.open,
            "is_away": self._away_since is not None,
            "dispatch_ms": self.times_ms(),
            "outages": [asdict(outage) for outage in self.outages],
        }
