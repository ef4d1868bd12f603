"""Plain-text tables and the cells in them. Pure text: no colour, no terminal."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = "  "
_UNITS_MS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table. A title that begins with `>` puts its column to the right, as numbers stand."""
    to_right = [title.startswith(">") for title in titles]
    lines = [[title.removeprefix(">") for title in titles], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        _GAP.join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    ]


def number(value: int) -> str:
    """A count, in groups of three digits."""
    return f"{value:,}"


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number(count)} {noun}" if count == 1 else f"{number(count)} {noun}s"


def duration(milliseconds: int) -> str:
    """A length of time in its largest fitting unit: `20 ms`, `3.2 s`, `60 s`, `5 min`, `2 h`."""
    for unit_ms, unit in _UNITS_MS:
        if milliseconds >= 2 * unit_ms or (unit == "s" and milliseconds >= unit_ms):
            return f"{milliseconds / unit_ms:.1f}".removesuffix(".0") + f" {unit}"
    return f"{milliseconds} ms"
