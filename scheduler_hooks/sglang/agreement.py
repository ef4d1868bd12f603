"""Whether all processes of a group take part in the gather, settled before any of them enters it.

A collective that one process skips hangs the others, and a node that was started without the plugin, with another
version of it or with other settings would skip it. So nobody gathers until all have said, in the group's own key-value
store, that they will, under a key that is made of everything that has to be alike.

It takes two of SGLang's own synchronisations. Before the second one ends at any process, every process has begun it,
so has been through the first: whoever was going to speak has spoken, and all read the same number. No waiting, no
time-out, and no collective of ours.
"""

from __future__ import annotations

from typing import Any


class Agreement:
    """`speak` after one synchronisation of the group, `is_reached` after the next."""

    def __init__(self, key: str, size: int, store: Any) -> None:
        """`size` processes; `store`: torch.distributed's, shared by them (`gather.everybodys_store`)."""
        self._key, self._size = f"dp_balancer/{key}", size
        self._store = store

    def speak(self) -> None:
        """Say that this process will take part. Returns when the store has it."""
        self._store.add(self._key, 1)

    def is_reached(self) -> bool:
        """Whether all have spoken for the same key."""
        return int(self._store.add(self._key, 0)) == self._size
