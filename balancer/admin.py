"""An operator's view of a pool: look, configure, drain, remove. Not for the hot path; raises what goes wrong."""

from __future__ import annotations

from balancer import protocol
from balancer.keys import pool_keys
from balancer.model import PoolSnapshot
from balancer.settings import Settings
from balancer.store import Store


class PoolAdmin:
    """Operations on one pool as a whole. Methods raise `StoreError`, `InvalidInput` or `Refused`."""

    def __init__(self, settings: Settings) -> None:
        self._store = Store(settings)
        self._pool = settings.pool

    def snapshot(self) -> PoolSnapshot:
        """The pool at one moment; raises `UnknownPool` where there is none of this name."""
        return self._store.run(protocol.snapshot(self._pool))

    def configure(self, **changes: object) -> None:
        """Change settings of the pool (`PoolSettings`), for all its dispatchers and engines at once."""
        self._store.run(protocol.configure(self._pool, changes))

    def drain(self, engine: str, index: int | None = None) -> int:
        """No new requests for an engine or one of its ranks; returns how many ranks stay eligible."""
        return self._store.run(protocol.drain(self._pool, engine, index))

    def undrain(self, engine: str, index: int | None = None) -> int:
        """New requests again; returns how many ranks are eligible."""
        return self._store.run(protocol.drain(self._pool, engine, index, undo=True))

    def remove(self) -> None:
        """Delete every key of the pool, its settings too. Engines that still report bring it back."""
        self._store.command("DEL", *pool_keys(self._pool))

    def close(self) -> None:
        """Close the connections."""
        self._store.close()
