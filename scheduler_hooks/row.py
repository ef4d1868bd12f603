"""The row that a rank brings to the gather: a fixed number of int64, whatever happened in the step.

    leads | holding tokens | requests | pending tokens | KV usage | number of ids | ids …, 0 beyond their number

`leads` is the index of the rank whose counts these are, or -1: in a tensor-parallel group several processes serve one
rank, and only its leader counts. Pending tokens and KV usage (thousandths): -1 where the engine does not know them.
Pure; `forms` sends rows, `gather` carries them.
"""

from __future__ import annotations

from array import array

from scheduler_hooks.intake import Counts, Share

HEADER = 6
NOBODY = -1
_UNKNOWN = -1


def new_row(rank_index: int | None, ids_per_gather: int) -> array[int]:
    """An empty row of the process that leads `rank_index`, or leads nobody: HEADER + ids_per_gather int64."""
    row = array("q", bytes(8 * (HEADER + ids_per_gather)))
    row[0] = NOBODY if rank_index is None else rank_index
    row[3] = row[4] = _UNKNOWN
    return row


def fill_row(row: array[int], share: Share) -> None:
    """Write a leader's share into its row, in place; the share has at most as many ids as the row has room."""
    received = share.received
    row[1], row[2], *known = share.counts
    row[3], row[4] = (_UNKNOWN if count is None else count for count in known or (None, None))
    row[5] = len(received)
    if received:
        row[HEADER : HEADER + len(received)] = array("q", received)


def read_rows(rows: memoryview, width: int, size: int) -> tuple[list[Counts], list[int]]:
    """The counts of `size` ranks, in order, and every received id, from the rows of all processes.

    `rows` are int64, one row of `width` after the other. They are read by columns, six reads however many rows: the
    step waits for this. Raises ValueError where some rank has no row: nobody may take it for an empty one.
    """
    leads, holding_tokens, requests, *more, ids = (rows[column::width].tolist() for column in range(HEADER))
    if max(map(max, more)) == _UNKNOWN:  # the rule: no rank's engine knows more
        by_rank: dict[int, Counts] = dict(zip(leads, zip(holding_tokens, requests, strict=True), strict=True))
    else:
        pending, usage = ([None if count == _UNKNOWN else count for count in column] for column in more)
        by_rank = dict(zip(leads, zip(holding_tokens, requests, pending, usage, strict=True), strict=True))
    by_rank.pop(NOBODY, None)
    if len(by_rank) != size:
        raise ValueError(f"of {size} ranks only {len(by_rank)} have a leader in the gather's group")
    received: list[int] = []
    if any(ids):
        for at, number in enumerate(ids):
            start = at * width + HEADER
            received += rows[start : start + number].tolist()
    return [by_rank[index] for index in range(size)], received
