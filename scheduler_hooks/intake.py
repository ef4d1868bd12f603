"""The intake: what an engine says after a step, made safe, and the carry of ids that have to wait.

An id that does not travel in this step's report is still in flight in Redis. So its tokens are kept out of the holding
count until it travels: what Redis adds up, holding + in flight, is what the rank holds, however long the queue of ids.

The rule is a subtraction: published holding = holding - the tokens that the waiting ids were received with. It stays
exact when a waiting request generates (its new tokens are in the holding count and in no booking) and when one finishes
(the holding count has lost its tokens, the subtraction takes them from the others, and its booking adds them back).
Only when a rank holds less than its waiting ids came with, since most of them have finished already, is there nothing
to subtract from: then 0 is published, and the rank looks fuller than it is by the difference until the ids have
travelled. Requests are counted in the same way, and so are pending tokens: until its id travels, a request is pending
as a booking. An id received with 0 tokens (rejected, or finished at once) is in no count, so nothing is subtracted for
it.

In comes the engine's word, on the step thread; out goes a `Share` for this step's report. Nothing here raises for bad
input: a rank that stumbled would miss the collective, and all others would hang in it.
"""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from balancer.model import MAX_COUNT, checked_count
from scheduler_hooks.once import Once

log = logging.getLogger("scheduler_hooks")

MAX_WAITING_IDS = 65_536
"""Most ids of one rank that wait for a report; beyond it the oldest are given to their bookings' lease."""

_MOST_ID = 2**63 - 1
_NO_TOKENS = 0
_MOST_PERMILLE = 1_000

Counts = tuple[int, int] | tuple[int, int, int | None, int | None]
"""A rank's holding tokens and requests, from an engine that knows them its pending tokens and KV usage too: the fields
of `balancer.RankCounts`, in order. A plain tuple: the step thread makes one per rank and step."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a report: its counts, and the received in-flight ids that these counts contain."""

    counts: Counts
    received: list[int]


class Intake:
    """One rank's last good counts, and the received ids that no report has carried yet, oldest first."""

    def __init__(self, most_waiting: int = MAX_WAITING_IDS) -> None:
        self.trouble = Once(log)
        self._most_waiting = most_waiting
        self._holding_tokens = 0
        self._requests = 0
        self._pending_tokens: int | None = None
        self._kv_permille: int | None = None
        self._waiting: OrderedDict[int, int] = OrderedDict()
        self._waiting_tokens = 0
        self._waiting_requests = 0

    @property
    def waiting(self) -> int:
        """How many received ids wait for a report."""
        return len(self._waiting)

    def take_in(
        self,
        holding_tokens: object,
        requests: object,
        received_ids: object,
        pending_tokens: object = None,
        kv_permille: object = None,
    ) -> None:
        """Take note of a step: tokens and requests held, and id -> tokens of what was received since the last call.

        `pending_tokens`, `kv_permille`: None where the engine does not know them. A count that is none (negative,
        fractional, NaN, beyond 2**40, of a wrong type) leaves the last good one in place; an id that is none is left
        out; a known id with bad tokens counts as received with 0.
        """
        self._holding_tokens = self._good(holding_tokens, "holding tokens", self._holding_tokens)
        self._requests = self._good(requests, "requests", self._requests)
        self._pending_tokens = (
            None if pending_tokens is None else self._good(pending_tokens, "pending tokens", self._pending_tokens or 0)
        )
        self._kv_permille = (
            None if kv_permille is None else self._good(kv_permille, "KV usage", self._kv_permille or 0, _MOST_PERMILLE)
        )
        for id_, tokens in self._good_mapping(received_ids).items():
            self._wait(id_, tokens)
        while len(self._waiting) > self._most_waiting:
            self._end_wait()
            self.trouble.note(
                "dropped id", "over %d received ids wait: the oldest are left to their lease", self._most_waiting
            )

    def share(self, most_ids: int | None = None) -> Share:
        """The part for this step's report, with the oldest `most_ids` waiting ids (None: all of them)."""
        if most_ids is None or most_ids >= len(self._waiting):
            received = list(self._waiting)
            self._waiting.clear()
            self._waiting_tokens = self._waiting_requests = 0
        else:
            received = [self._end_wait() for _ in range(most_ids)]
        holding_tokens = max(0, self._holding_tokens - self._waiting_tokens)
        requests = max(0, self._requests - self._waiting_requests)
        pending_tokens = self._pending_tokens
        if pending_tokens is None and self._kv_permille is None:
            return Share((holding_tokens, requests), received)
        if pending_tokens is not None:
            pending_tokens = max(0, pending_tokens - self._waiting_tokens)
        return Share((holding_tokens, requests, pending_tokens, self._kv_permille), received)

    def _wait(self, id_: object, tokens: object) -> None:
        good_id = self._good(id_, "received id", -1, _MOST_ID)
        # An id is one booking however often it comes: what was booked is what it came with first.
        if good_id < 0 or good_id in self._waiting:
            return
        good_tokens = self._good(tokens, "tokens of a received id", _NO_TOKENS)
        self._waiting[good_id] = good_tokens
        self._waiting_tokens += good_tokens
        self._waiting_requests += good_tokens > 0

    def _end_wait(self) -> int:
        id_, tokens = self._waiting.popitem(last=False)
        self._waiting_tokens -= tokens
        self._waiting_requests -= tokens > 0
        return id_

    def _good(self, value: object, what: str, otherwise: int, most: int = MAX_COUNT) -> int:
        """`value` as a whole number (numpy's and torch's integers too), or `otherwise`, noted."""
        if type(value) is int and 0 <= value <= most:  # the rule, and twenty times faster than what follows
            return value
        try:
            number = value if isinstance(value, float) else operator.index(value)  # type: ignore[arg-type]
            return checked_count(number, what, most=most)  # type: ignore[arg-type]
        except Exception as error:  # whatever an engine's number does when it is read
            self.trouble.note(what, "bad input from the engine, %s: %s", what, error)
            return otherwise

    def _good_mapping(self, received_ids: object) -> Mapping[object, object]:
        try:
            return dict(received_ids) if received_ids else {}  # type: ignore[call-overload]
        except Exception as error:
            self.trouble.note("received ids", "bad input from the engine, received ids: %s", error)
            return {}
