"""The collective: rows of int64 from every process of a group to its first, by torch.distributed on the CPU.

The only room of the hook that imports torch (imported itself when a hook gathers, not before). It knows shapes and
nothing of what the numbers mean. Its shape never depends on what happened in a step, since a collective whose
shape differs between processes is a hang or garbage. Rows come from `forms`, on the step thread, and go back there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class TorchGather:
    """Gathers one row of `width` int64 per process of `group` at the group's first rank. Works on gloo groups.

    `group` None is the default group. Buffers are made once: torch's view and ours are the same memory.
    """

    def __init__(self, width: int, group: Any = None) -> None:
        group = dist.group.WORLD if group is None else group
        self._group = group
        # A group's first rank need not be global rank 0: with pipeline parallelism it is not.
        self._first = dist.get_global_rank(group, 0)
        self.is_first = dist.get_rank(group) == 0
        self._sent = array("q", bytes(8 * width))
        self._sent_tensor = torch.frombuffer(self._sent, dtype=torch.int64)
        self._rows: memoryview | None = None
        self._row_tensors: list[torch.Tensor] | None = None
        if self.is_first:
            # As many rows as the group has processes, not as the engine has ranks.
            rows = bytearray(8 * width * dist.get_world_size(group))
            self._rows = memoryview(rows).cast("q")
            self._row_tensors = list(torch.frombuffer(rows, dtype=torch.int64).view(-1, width).unbind())

    def gather(self, row: array[int]) -> memoryview | None:
        """Take part with `row` (`width` int64); waits for the others as every collective does.

        Returns, at the group's first rank, everybody's rows, one after the other in the order of the group, valid until
        the next call; None at the others. Raises what torch raises (RuntimeError when a process is gone).
        """
        self._sent[:] = row
        dist.gather(self._sent_tensor, self._row_tensors, dst=self._first, group=self._group)
        return self._rows


def everybodys(values: Sequence[int], group: Any = None) -> list[list[int]]:
    """What each process of `group` gave (equally many int64 each), at every process; a collective, for start-up."""
    mine = torch.tensor(list(values), dtype=torch.int64)
    all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_, mine, group=group)
    return [given.tolist() for given in all_]


def sizes(group: Any = None) -> tuple[int, int]:
    """How many processes `group` has, and how many there are in all."""
    return dist.get_world_size(group), dist.get_world_size()


def everybodys_store() -> Any:
    """The key-value store at which all processes met; not a collective."""
    return dist.distributed_c10d._get_default_store()
