"""Whether every rank that SGLang may send to is in the pool; one that never was would get no request at all.

A rank is missing where its process has no plugin (the image of a second node, a variable not set there) or could not
attach it. A dispatch chooses among the ranks that report, so such a rank would stand idle, and nobody would see why. As
long as one is missing, or no look was answered, SGLang's own method places. A rank that was there and has gone silent
is another thing: it is known, and avoided.

Asked before each dispatch: a comparison of two sets, and while a rank is missing a snapshot, at most once per LOOK_S,
also while Redis is taken to be away: where nothing is dispatched, nothing else would notice that it is back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from balancer import BalancerError, Dispatcher, UnknownPool

log = logging.getLogger("scheduler_hooks.sglang")

LOOK_S = 1.0

PATIENCE_S = 5.0
"""How long after the first request a rank may be missing before that is worth a warning: starting takes a moment."""


class Joined:
    """The ranks of `engine` that have reported since this controller began."""

    def __init__(self, engine: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._began_s = clock()
        self._known: set[int] = set()
        self._blind: BalancerError | None = None  # why the first look was not answered
        self._has_looked = False
        self._looked_s = float("-inf")
        self._missed_s: float | None = None
        self._said = ""

    def lacks_any(self, active: Sequence[int], dispatcher: Dispatcher) -> bool:
        """Whether one of the `active` ranks has not been seen in the pool."""
        if self._known.issuperset(active):
            self._say([])
            return False
        now = self._clock()
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self._look(dispatcher)
        missing = sorted(set(active) - self._known)
        self._say(missing)
        return bool(missing)

    def _look(self, dispatcher: Dispatcher) -> None:
        try:
            snapshot = dispatcher.snapshot()
        except UnknownPool:
            self._has_looked = True
            return
        except BalancerError as error:
            self._blind = self._blind or error
            return
        self._has_looked = True
        # What last reported before this server began is of its former life.
        oldest_ms = 1_000 * (self._clock() - self._began_s) + snapshot.settings.engine_lease_ms
        names = (rank.rank.rpartition("/") for rank in snapshot.ranks if rank.age_ms <= oldest_ms)
        self._known.update(int(index) for engine, _, index in names if engine == self._engine)

    def _say(self, missing: list[int]) -> None:
        now = self._clock()
        if not missing:
            if self._said:
                log.info("all ranks of %s are in the pool now: dp-balancer places its requests", self._engine)
            self._missed_s, self._said = None, ""
            return
        self._missed_s = now if self._missed_s is None else self._missed_s
        if now - self._missed_s >= PATIENCE_S and (why := self._why(missing)) != self._said:
            self._said = why
            log.warning("SGLang's own method places until %s", why)

    def _why(self, missing: list[int]) -> str:
        if not self._has_looked:
            return f"the pool says which ranks it has: {self._blind}"
        return (
            f"{', '.join(f'{self._engine}/{rank}' for rank in missing)} reports to the pool: "
            "has its node the plugin, and the same DP_BALANCER_URL and DP_BALANCER_ENGINE?"
        )
