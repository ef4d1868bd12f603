"""The mailbox between the step thread and the publisher's thread: one place, so that neither waits for the other.

Newest counts win; received ids accumulate, up to a bound. The lock is held for the length of an assignment and of
copying one step's ids, never for I/O.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler_hooks.intake import Counts


@dataclass(frozen=True, slots=True)
class News:
    """What was put since the last take: the newest step and its counts, all received ids, how many puts it merges,
    and how many ids found no room."""

    step: int
    counts: Sequence[Counts]
    received: deque[int]
    puts: int
    dropped_ids: int


class Mailbox:
    """One place for news. `most_ids` bounds the ids in it; beyond it the oldest go."""

    def __init__(self, most_ids: int) -> None:
        self._most_ids = most_ids
        self._condition = threading.Condition(threading.Lock())
        self._is_awake = False
        self._clear()

    def _clear(self) -> None:
        self._step = 0
        self._counts: Sequence[Counts] = ()
        self._ids: deque[int] = deque(maxlen=self._most_ids)
        self._puts = 0
        self._dropped_ids = 0

    def put(self, step: int, counts: Sequence[Counts], received: Sequence[int]) -> None:
        """Leave news; returns at once. `counts` is kept, not copied."""
        with self._condition:
            self._step, self._counts = step, counts
            self._puts += 1
            if received:
                self._dropped_ids += max(0, len(self._ids) + len(received) - self._most_ids)
                self._ids.extend(received)
            self._condition.notify()

    def take(self, timeout_s: float) -> News | None:
        """The news, as soon as there are any, or None after `timeout_s` seconds or a `wake`."""
        with self._condition:
            self._condition.wait_for(lambda: self._puts or self._is_awake, timeout_s)
            if not self._puts:
                return None
            news = News(self._step, self._counts, self._ids, self._puts, self._dropped_ids)
            self._clear()
            return news

    def wake(self) -> None:
        """From now on nobody waits in `take`."""
        with self._condition:
            self._is_awake = True
            self._condition.notify_all()
