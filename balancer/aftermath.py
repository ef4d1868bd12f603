"""What outlasts an outage: engines that Redis calls silent though they are well, and bookings that nobody wants.

While Redis was away no engine could report. Back after an engine's lease, or back empty, it knows of no engine that is
up until each has reported, which takes a heartbeat: for so long its "nobody" says nothing, and `placing` goes on with
the last known loads. The same where Redis has lost its data and nobody saw it go away: a flush, a quick failover.

A dispatch whose answer was lost may have booked, or may do so late; its request went where the fallback sent it, and
where the engine acknowledged it before the booking was made, only the lease would end that.
Such ids are owed: they are released when the aftermath is over, by when what was under way has arrived and engines have
counted what they received. The same is owed where a release did not reach Redis, or a caller gave up waiting for its
placement. An owed id that is placed after all is owed no more. An id that several dispatchers place at once, or that is
dispatched again and loses its second answer, may lose a booking that is wanted: until its engine has counted it, its
rank then looks emptier than it is. So ids must differ between requests.

Bounded: of more than `most_ids` the oldest are left to their lease. Thread-safe; the clock is an argument.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

AFTERMATH_MS = 2_000
"""Two heartbeats of an engine that has nothing to do (`scheduler_hooks.publisher`)."""

MOST_OWED = 16_384
"""Most ids kept for a release, 512 bytes each at the longest."""

_AT_ONCE = 256
"""Most ids of one release: it goes before somebody's dispatch."""


class Aftermath:
    """What one dispatcher remembers of outages."""

    def __init__(
        self,
        length_ms: int = AFTERMATH_MS,
        most_ids: int = MOST_OWED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._length_s, self._most_ids, self._clock = length_ms / 1000, most_ids, clock
        self._lock = threading.Lock()
        self._until_s = float("-inf")
        self._owed: dict[str, float] = {}  # request id → when it may be released, in order

    def begin(self) -> None:
        """Redis has answered for the first time after an outage, or has lost its data."""
        self._until_s = self._clock() + self._length_s

    @property
    def is_under_way(self) -> bool:
        """Whether an outage has ended so lately that engines may not have reported since."""
        return self._clock() < self._until_s

    def owe(self, request_ids: Iterable[str]) -> None:
        """Redis may hold bookings of these requests, or make them yet, and nobody wants them."""
        due_s = self._clock() + self._length_s
        with self._lock:
            for request_id in request_ids:
                self._owed.pop(request_id, None)
                self._owed[request_id] = due_s
            while len(self._owed) > self._most_ids:
                del self._owed[next(iter(self._owed))]

    def settled(self, request_ids: Iterable[str]) -> None:
        """Redis has answered for these requests: released, or placed after all."""
        if self._owed:
            with self._lock:
                for request_id in request_ids:
                    self._owed.pop(request_id, None)

    def due(self) -> Sequence[str]:
        """Some of the ids to be released now; they are not due again at once, be they `settled` or not."""
        if not self._owed or self.is_under_way:
            return ()
        now_s = self._clock()
        with self._lock:
            found: list[str] = []
            for request_id, due_s in self._owed.items():
                if due_s > now_s or len(found) == _AT_ONCE:
                    break
                found.append(request_id)
        if found:
            self.owe(found)
        return found
