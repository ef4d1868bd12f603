"""The reporter: an engine's side of the pool. It joins, reports its counts and what it received, and leaves.

It does what it is told, when it is told, and raises what goes wrong; `scheduler_hooks` decides when, on a thread of its
own, so that no engine step ever waits for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from balancer import protocol
from balancer.keys import pool_keys
from balancer.model import Incarnation, RankCounts, Report, Reported
from balancer.settings import Settings
from balancer.store import Store


class Reporter:
    """One life of an engine (or, with `index`, of one of its ranks that reports alone) in one pool."""

    def __init__(
        self,
        settings: Settings,
        engine: str,
        size: int = 1,
        index: int | None = None,
        address: str = "",
        capacity_tokens: int | None = None,
    ) -> None:
        nonce = secrets.token_hex(4)
        self._store = Store(settings)
        self._pool = settings.pool
        self._incarnation = Incarnation(engine, size, nonce, index, address, capacity_tokens)

    @property
    def incarnation(self) -> Incarnation:
        """Who reports; its epoch is 0 until it has joined."""
        return self._incarnation

    def join(self) -> int:
        """Begin this life; returns its epoch. Repeating is harmless. Raises `StoreError` or `Refused`."""
        self._incarnation = self._store.run(protocol.join(self._pool, self._incarnation))
        return self._incarnation.epoch

    def report(self, step: int, counts: Sequence[RankCounts], received: Sequence[int] = ()) -> Reported:
        """Replace the holding counts (one per rank, in order) and end the bookings of `received` in-flight ids.

        `step` rises with every new report; a repeat is harmless. Joins first where this life has not. Raises
        `Fenced` when a newer life has joined, `StoreError` when Redis is away (try again: nothing is lost).
        """
        if not self._incarnation.epoch:
            self.join()
        return self._store.run(protocol.report(self._pool, self._incarnation, Report(step, counts, received)))

    def engine_lease_ms(self) -> int | None:
        """How long this pool believes an engine without a report, in ms, as configured now; None in an empty Redis.

        One command and no retry, for between two reports. Raises `StoreError`.
        """
        found = self._store.command("HGET", pool_keys(self._pool)[0], "engine_lease_ms")
        return None if found is None else int(found)

    def leave(self) -> None:
        """Remove this engine's ranks from the pool; a newer life is not touched."""
        if self._incarnation.epoch:
            self._store.run(protocol.leave(self._pool, self._incarnation))

    def close(self) -> None:
        """Close the connections."""
        self._store.close()
