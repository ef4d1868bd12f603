"""The two forms of a hook: all ranks gathered into one report, or each rank's leader reporting alone.

A form takes a rank's share out of its intake and passes it on, by collective or not, to an outlet (the publisher). It
decides neither when (`step_hook` does) nor what the counts are (`intake` does).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Protocol

from scheduler_hooks.intake import Counts, Intake
from scheduler_hooks.once import Once
from scheduler_hooks.row import HEADER, fill_row, new_row, read_rows

log = logging.getLogger("scheduler_hooks")


class Outlet(Protocol):
    """Where a step's counts go: a `Publisher`."""

    def hand_over(self, step: int, counts: Sequence[Counts], received: Sequence[int] = ()) -> None:
        """Take a step's counts and received ids; returns at once."""
        ...

    def still_here(self, patience_s: float) -> None:
        """Say that the engine's loop goes on; see `Publisher.still_here`."""
        ...

    def silence(self) -> None:
        """Report no more."""
        ...

    def close(self) -> None:
        """End the reporting."""
        ...


class Gather(Protocol):
    """A collective of fixed shape: `TorchGather`."""

    def gather(self, row: array[int]) -> memoryview | None:
        """Take part with `row`; everybody's rows, one after the other, at the first process, None at the others."""
        ...


class Form(Protocol):
    """How a rank's share gets to Redis."""

    leads: bool
    """Whether this process speaks for a rank."""

    @property
    def outlet(self) -> Outlet | None:
        """Where the reports leave this process, if they do so here."""
        ...

    def pass_on(self, step: int, intake: Intake) -> None:
        """Pass on this rank's share of step `step`."""
        ...

    def close(self) -> None:
        """End the reporting; a collective goes on for as long as the engine steps."""
        ...


class LeaderForm:
    """This rank reports alone: no collective."""

    def __init__(self, outlet: Outlet) -> None:
        self.leads = True
        self.outlet = outlet

    def pass_on(self, step: int, intake: Intake) -> None:
        """See `Form`."""
        share = intake.share()
        self.outlet.hand_over(step, [share.counts], share.received)

    def close(self) -> None:
        """See `Form`."""
        self.outlet.close()


class GatherForm:
    """Every process of the group takes part; its first one has the outlet, the others None.

    `rank_index` is the rank that this process leads, None where it leads none; `size` the engine's number of ranks;
    `ids_per_gather` how many received ids travel with one row.
    """

    def __init__(
        self, gather: Gather, rank_index: int | None, size: int, ids_per_gather: int, outlet: Outlet | None
    ) -> None:
        self.leads = rank_index is not None
        self._gather: Gather | None = gather
        self._size = size
        self.outlet = outlet
        self._row = new_row(rank_index, ids_per_gather)
        self._trouble = Once(log)

    def pass_on(self, step: int, intake: Intake) -> None:
        """See `Form`. Enters the collective whatever happens, and leaves it for good when it has failed."""
        if self._gather is None:
            return
        if self.leads:
            try:
                fill_row(self._row, intake.share(len(self._row) - HEADER))
            except Exception as error:  # the last row goes once more, for to stay away is to hang the others
                self._trouble.note("row", "a step's counts are left out: %r", error, level=logging.ERROR)
        try:
            rows = self._gather.gather(self._row)
        except Exception as error:
            self._gather = None
            log.error("the hook's collective has failed and is off, this engine is reported no more: %r", error)
            if self.outlet:
                self.outlet.silence()
            return
        if rows is not None and self.outlet:
            self.outlet.hand_over(step, *read_rows(rows, len(self._row), self._size))

    def close(self) -> None:
        """See `Form`."""
        if self.outlet:
            self.outlet.close()
