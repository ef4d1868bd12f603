"""The publisher: a thread that reports an engine's counts and received ids to Redis, so that no step waits for it.

The step thread hands over and goes on. The thread sends what is newest, one EVAL at a time: counts that were overtaken
meanwhile are never sent, received ids all are. While Redis is away it keeps the newest counts and the ids (up to a
bound, then the oldest are left to their bookings' lease) and tries again; one report after Redis' return the pool is
exact again. After each report it rests, so that where Redis is slow for many ranks each of them reports less often, and
what was received stays in flight until it does. When no step comes it repeats its last report, so that an idle engine
keeps its lease. By itself this says that the process lives; an adapter that is called in each round of its engine's
loop, idle ones too, says so by `still_here`, and then the lease of an engine whose loop hangs ends.

A publisher belongs to the process that made it. In a forked copy it does nothing: two processes that report under one
epoch would overwrite each other, and a child's exit must not take its parent's engine out of the pool.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from balancer import Fenced, InvalidInput, RankCounts, Refused, Reporter, StoreDenied, StoreError
from scheduler_hooks.intake import Counts
from scheduler_hooks.mailbox import Mailbox

log = logging.getLogger("scheduler_hooks")

HEARTBEAT_S = 1.0
"""Seconds without a step after which the last report is repeated, and the longest pause between two tries while Redis
is away. Where a third of the pool's engine lease (5 s by default) is less, that."""

REPORTING_SHARE = 0.05
"""Most of its time that a publisher has a report under way, on average: it rests after each. Otherwise the ranks of a
few large servers, which report at the same moment every step, keep Redis so busy that dispatches miss their budget."""

MAX_REST_S = 0.1
"""Longest rest after a report, on average: by the design's simulation, loads 100 ms old cost 0.3 %."""

MAX_UNSENT_IDS = 65_536
"""Most received ids kept for Redis' return."""

REPORT_BUDGET_MS = 2_000
"""Time budget of one report. Nobody waits for it, and one with a whole outage's ids takes longer than a dispatch."""

CLOSE_S = 1.0
"""How long `close` waits for the engine to be out of the pool."""

_REPORTS_PER_LEASE = 3
_FIRST_PAUSE_S = 0.02
_SLOW_HEARTBEATS = 5
"""Heartbeats between two tries of what a person has to set right (password, schema, foreign keys)."""


@dataclass(slots=True)
class PublisherCounters:
    """`published` reports that Redis took, heartbeats included; `coalesced` hand-overs whose counts were overtaken
    before they were sent; `dropped_ids` left to their lease; `failures` of a report."""

    published: int = 0
    coalesced: int = 0
    dropped_ids: int = 0
    failures: int = 0


def checked_heartbeat(heartbeat_s: float) -> float:
    """Return `heartbeat_s` if it is a number of seconds in (0, 3600], else raise `InvalidInput`."""
    if not isinstance(heartbeat_s, int | float) or not 0 < heartbeat_s <= 3600:
        raise InvalidInput(f"heartbeat must be more than 0 and at most 3600 seconds, not {heartbeat_s!r}")
    return heartbeat_s


def _rest_s(took_s: float, pulse_s: float) -> float:
    """How long to rest after a report that took `took_s`; no heartbeat (each `pulse_s`) is put off by it.

    Give or take half of it: what slowed down many publishers together would else bring them back together.
    """
    return min(random.uniform(0.5, 1.5) * min(took_s / REPORTING_SHARE - took_s, MAX_REST_S), pulse_s)


class Publisher:
    """Publishes through `reporter` from construction on: the engine joins, empty, before its first step.

    An idle engine need not step, and would never get a request otherwise. `heartbeat_s` in seconds.
    """

    def __init__(
        self, reporter: Reporter, heartbeat_s: float = HEARTBEAT_S, most_unsent_ids: int = MAX_UNSENT_IDS
    ) -> None:
        self.counters = PublisherCounters()
        self._reporter = reporter
        self._name = reporter.incarnation.name
        self._heartbeat_s = checked_heartbeat(heartbeat_s)
        self._pulse_s = self._heartbeat_s  # the same, or less where the pool's lease is short
        self._rest_s = 0.0  # after the last report that Redis took
        self._mailbox = Mailbox(most_unsent_ids)
        self._most_unsent_ids = most_unsent_ids
        self._step = 0
        self._counts: Sequence[Counts] = [(0, 0)] * reporter.incarnation.size
        self._unsent: deque[int] = deque(maxlen=most_unsent_ids)
        self._trouble: type[Exception] | None = None
        self._trouble_since = 0.0
        self._next_pause_s = _FIRST_PAUSE_S
        self._is_sent = True
        self._is_silent = False
        self._said_forked = False
        self._said_not_left = False
        self._patience_s: float | None = None  # what `still_here` was last given
        self._here_s = 0.0
        self._is_stuck = False
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"dp-balancer {self._name}", daemon=True)
        self._thread.start()
        # A process that ends without a close would leave an engine in the pool that gets requests until its lease
        # ends. What no handler sees (a signal, os._exit, a crash) is what the lease is for.
        atexit.register(self.close)

    def hand_over(self, step: int, counts: Sequence[Counts], received: Sequence[int] = ()) -> None:
        """Take a step's counts and the in-flight ids that they contain.

        `counts`: holding tokens and requests of each rank, in order, a sequence that nobody changes afterwards.
        `step` counts from 1 and rises. Returns at once, whatever Redis does; O(received).
        """
        if self._is_mine() and not self._is_silent:
            self._mailbox.put(step, counts, received)

    def still_here(self, patience_s: float) -> None:
        """Say that the engine's loop goes on. From the first call on, heartbeats end `patience_s` after the last one.

        A loop that hangs (a collective whose peer is gone, a kernel that does not return) is still a process that
        lives, and would be sent requests until somebody ends it. With the next round the engine is back. Costs less
        than a microsecond.
        """
        self._here_s = time.monotonic()
        self._patience_s = patience_s

    def silence(self) -> None:
        """Report no more, heartbeats included: the counts can no longer be known, and the lease ends the engine."""
        self._is_silent = True

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Take the engine out of the pool and end the thread; waits `timeout_s` seconds at most. May be repeated.

        When Redis is away for that long, the engine's lease ends it.
        """
        if os.getpid() != self._pid:
            return
        self._is_silent = True
        atexit.unregister(self.close)
        self._closing.set()
        self._mailbox.wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive() and not self._said_not_left:
            self._said_not_left = True
            log.warning("%s could not leave its pool within %g s: its lease ends it", self._name, timeout_s)

    def _is_mine(self) -> bool:
        if os.getpid() == self._pid:
            return True
        if not self._said_forked:
            self._said_forked = True
            log.error("%s is reported by process %d, not by its fork %d", self._name, self._pid, os.getpid())
        return False

    def _run(self) -> None:
        pause_s = self._publish()
        self._follow_lease()
        while not self._closing.wait(pause_s or self._rest_s):
            has_failed = pause_s > 0  # then the pause was the waiting, and there is something to send
            has_news = self._take(0 if has_failed else self._pulse_s - self._rest_s)
            if self._closing.is_set():
                break
            if not has_news and self._is_sent and self._hangs():
                continue
            pause_s = self._publish()
            if not has_news:
                self._follow_lease()
        self._leave()

    def _hangs(self) -> bool:
        patience_s = self._patience_s
        is_stuck = patience_s is not None and time.monotonic() - self._here_s > patience_s
        if is_stuck is not self._is_stuck:
            self._is_stuck = is_stuck
            if is_stuck:
                log.error("%s: no round of the engine's loop for %g s: its lease ends it", self._name, patience_s)
            else:
                log.info("%s: the engine's loop goes on", self._name)
        return is_stuck

    def _follow_lease(self) -> None:
        """Learn what the pool's lease is now. Only when no step came, for a step's report renews the lease itself."""
        if self._is_silent or self._trouble is not None:
            return
        with suppress(Exception):  # the next heartbeat asks again
            lease_ms = self._reporter.engine_lease_ms()
            if lease_ms:
                self._pulse_s = min(self._heartbeat_s, lease_ms / 1000 / _REPORTS_PER_LEASE)

    def _take(self, timeout_s: float) -> bool:
        news = self._mailbox.take(timeout_s)
        if news is None:
            return False
        self.counters.coalesced += news.puts - 1 + (not self._is_sent)
        dropped = news.dropped_ids + max(0, len(self._unsent) + len(news.received) - self._most_unsent_ids)
        if dropped and not self.counters.dropped_ids:
            log.warning(
                "%s has over %d unsent ids: the oldest are left to their lease", self._name, self._most_unsent_ids
            )
        self.counters.dropped_ids += dropped
        self._step, self._counts, self._is_sent = news.step, news.counts, False
        self._unsent.extend(news.received)
        return True

    def _publish(self) -> float:
        """Report once; returns how many seconds to pause now."""
        if self._is_silent:
            return self._heartbeat_s
        began_s = time.monotonic()
        try:
            counts = [RankCounts(*pair) for pair in self._counts]
            self._reporter.report(self._step, counts, self._unsent)
        except Fenced as error:
            log.error("%s stops reporting for good: %s", self._name, error)
            self.counters.failures += 1
            self._is_silent = True
            self._closing.set()
            return 0
        except InvalidInput as error:  # would be refused for ever
            self._unsent.clear()
            return self._failed(error, is_slow=True)
        except Exception as error:  # a bug of ours: the engine goes on, and so do we
            is_away = isinstance(error, StoreError) and not isinstance(error, StoreDenied)
            return self._failed(error, is_slow=not is_away)
        self._unsent.clear()
        self._is_sent = True
        self._rest_s = _rest_s(time.monotonic() - began_s, self._pulse_s)
        self._succeeded()
        return 0

    def _succeeded(self) -> None:
        self.counters.published += 1
        if self._trouble is not None:
            log.info("%s reports again after %.1f s", self._name, time.monotonic() - self._trouble_since)
            self._trouble = None
            self._next_pause_s = _FIRST_PAUSE_S

    def _failed(self, error: Exception, is_slow: bool) -> float:
        self.counters.failures += 1
        if self._trouble is None:
            self._trouble_since = time.monotonic()
        if self._trouble is not type(error):
            self._trouble = type(error)
            if isinstance(error, Refused | StoreDenied | InvalidInput):
                log.error("%s cannot report, keeps trying: %s", self._name, error)
            elif isinstance(error, StoreError):
                log.warning("%s cannot report, keeps its ids and tries again: %s", self._name, error)
            else:
                log.error("%s cannot report, keeps trying", self._name, exc_info=error)
        if is_slow:
            return _SLOW_HEARTBEATS * self._heartbeat_s
        pause_s = min(self._next_pause_s, self._pulse_s)
        self._next_pause_s = 2 * pause_s
        return pause_s * random.uniform(0.5, 1)  # engines that lost Redis together come back apart

    def _leave(self) -> None:
        try:
            self._reporter.leave()
        except Fenced:
            pass  # a newer life has these ranks now
        except Exception as error:
            log.warning("%s could not leave its pool, its lease ends it: %s", self._name, error)
        finally:
            self._reporter.close()
