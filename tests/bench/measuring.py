"""How a ratio is measured and shown: both sides in turn, the median over many rounds.

The room knows nothing of Redis. A round measures each side once, in an order that is reversed from round to round;
the ratio of a round is robust against noise slower than a round, the median over rounds against the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

Unit = Literal["%", "x", "bytes"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a number must be: at least or at most `value`, in the unit of its row."""

    bound: Literal["at least", "at most"]
    value: float

    def is_met(self, value: float) -> bool:
        return value >= self.value if self.bound == "at least" else value <= self.value


@dataclass(frozen=True, slots=True)
class Row:
    """One result: `what` was measured `against` which reference; `low` and `high` are the quartiles over the rounds.

    `context` holds absolute numbers of this machine in this run, for a reader; nothing is judged by them.
    """

    what: str
    against: str
    value: float
    low: float
    high: float
    unit: Unit
    target: Target | None = None
    context: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return self.target.is_met(self.value) if self.target else None

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"met": self.met}


def in_turn(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Measure each side once per round, forwards and backwards in turn; returns one list per side."""
    results: list[list[float]] = [[] for _ in measures]
    order = list(range(len(measures)))
    for _ in range(rounds):
        for side in order:
            results[side].append(measures[side]())
        order.reverse()
    return results


def row(
    what: str,
    against: str,
    measured: Sequence[float],
    reference: Sequence[float],
    unit: Unit = "x",
    target: Target | None = None,
    scale: float = 1.0,
    context: Mapping[str, float] | None = None,
) -> Row:
    """`measured` as a ratio to `reference`, round by round, times `scale`; in percent where the unit is "%"."""
    factor = scale * (100 if unit == "%" else 1)
    ratios = [factor * one / other for one, other in zip(measured, reference, strict=True)]
    low, middle, high = quartiles(ratios)
    absolute = {"measured": statistics.median(measured), "reference": statistics.median(reference)}
    return Row(what, against, middle, low, high, unit, target, absolute | dict(context or {}))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower end of the 95 % interval of the mean (Student's t), the mean, upper end; a single value is all three."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return (mean,) * 3
    t = _T_95[min(len(values) - 1, len(_T_95)) - 1]
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean, mean + half


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    lines = [("", "against", "median", "quartiles", "target", "")]
    for result in rows:
        target = f"{result.target.bound} {_shown(result.target.value, result.unit)}" if result.target else "-"
        verdict = {None: "", True: "met", False: "MISSED"}[result.met]
        spread = f"{_shown(result.low, result.unit)} .. {_shown(result.high, result.unit)}"
        lines.append((result.what, result.against, _shown(result.value, result.unit), spread, target, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = [title]
    for what, against, *numbers, verdict in lines:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[2:5], strict=True)]
        text.append(f"  {what:<{widths[0]}}  {against:<{widths[1]}}  {'  '.join(cells)}  {verdict}".rstrip())
    return "\n".join(text)


def _shown(value: float, unit: Unit) -> str:
    digits = 0 if unit == "bytes" or value >= 100 else 1 if value >= 10 else 2
    digits = 3 if abs(value) < 0.1 else digits
    return f"{value:.{digits}f} {unit}" if unit == "bytes" else f"{value:.{digits}f}{unit}"
