"""Whether all processes of a group take part in the gather, settled before any of them enters it.

A collective that one process skips hangs the others, and a node that was started without the plugin, with another
version of it or with other settings would skip it. So nobody gathers until all have said, in the group's own key-value
store, that they will, under a key that is made of everything that has to be alike.

A round takes two of SGLang's own synchronisations. Before the second one ends at any process, every process has begun
it, so has been through the first: whoever was going to speak has spoken, and all read the same number. No waiting, no
time-out, and no collective of ours. There are three rounds, for what may fail at one process alone:

1. it will take part, and has all that this takes
2. it has read that all will; one that could not read stays silent here, and nobody begins
3. it has built its side of the gather; one that could not stays silent, and nobody goes on
"""

from __future__ import annotations

from typing import Any

PROTOCOL = 2
"""To be raised with every change of what processes do together: two versions then never agree."""

ROUNDS = 3


class Agreement:
    """In each round: `speak` after one synchronisation of the group, `is_reached` after the next."""

    def __init__(self, key: str, size: int, store: Any) -> None:
        """`size` processes; `store`: torch.distributed's, shared by them (`gather.everybodys_store`)."""
        self._key, self._size = f"dp_balancer/{PROTOCOL}/{key}", size
        self._store = store
        self.rounds = 0
        """How many have been read."""

    def speak(self) -> None:
        """Say that this process goes on. Returns when the store has it."""
        self._store.add(f"{self._key}/{self.rounds}", 1)

    def is_reached(self) -> bool:
        """Whether all have spoken for the same key; ends the round.

        Raises what the store raises in the first round. In a later one a process that has spoken and cannot read takes
        it that the others have spoken too, for they all did before: to stay away from them would be the worse mistake.
        """
        read, self.rounds = self.rounds, self.rounds + 1
        try:
            return int(self._store.add(f"{self._key}/{read}", 0)) == self._size
        except Exception:
            if read == 0:
                raise
            return True
