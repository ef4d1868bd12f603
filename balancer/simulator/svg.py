"""Plots as inline SVG: lines over an axis, and dots with their intervals. No script, no style from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 44
_ROW, _ACROSS = 16, 3
"""Legends stand below the plot, in rows of so many."""
_LOG_FROM = 4
"""A logarithmic axis over less than this factor has hardly a tick: then it is linear."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#4d4d4d", "#a6761d", "#1b9e77")
"""Okabe and Ito's colours first: told apart by colour-blind readers too."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points in order of x; `name` empty leaves it out of the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    width: float = 1.6
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with half the width of its interval."""

    name: str
    value: float
    half_width: float
    color: str


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    log_x: bool = False,
    from_zero: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines in one frame; `from_zero` lets y begin at 0, `y_range` is given where several plots are compared."""
    points = [point for line in lines for point in line.points if not log_x or point[0] > 0]
    if not points:
        return _frame(title, x_label, y_label, "")
    x_axis = _Axis.over([x for x, _ in points], log=log_x)
    ys = list(y_range) if y_range else [y for _, y in points]
    y_axis = _Axis.over([0.0, *ys] if from_zero else ys)
    body = [*_x_ticks(x_axis), *_y_ticks(y_axis)]
    for line in lines:
        path = " ".join(f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}" for x, y in line.points if not log_x or x > 0)
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="{line.width}"'
            f' stroke-opacity="{line.opacity}"/>'
        )
    named = [(line.name, line.color) for line in lines if line.name]
    legend = _legend(named)
    return _frame(
        title, x_label, y_label, "".join([*body, *legend]), HEIGHT + _ROW * -(-len(named) // _ACROSS), HEIGHT - 12
    )


def dot_plot(title: str, x_label: str, dots: Sequence[Dot]) -> str:
    """One row for each value, with its interval; the axis has 0, and a line there."""
    height = _TOP + _BOTTOM + 22 * len(dots)
    left = 150
    ends = [end for dot in dots for end in (dot.value - dot.half_width, dot.value + dot.half_width)]
    axis = _Axis.over([0.0, *ends])

    def place(value: float) -> float:
        return left + axis.share(value) * (WIDTH - left - _RIGHT)

    body = []
    for tick in axis.ticks():
        x = place(tick)
        stroke = "#888888" if tick == 0 else "#e3e3e3"
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" stroke="{stroke}"/>')
        body.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 15}" text-anchor="middle">{_short(tick)}</text>')
    for row, dot in enumerate(dots):
        y = _TOP + 22 * row + 11
        low, high = place(dot.value - dot.half_width), place(dot.value + dot.half_width)
        body.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(dot.name)}</text>')
        body.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{dot.color}" stroke-width="3"/>')
        body.append(f'<circle cx="{place(dot.value):.1f}" cy="{y}" r="4.5" fill="{dot.color}"/>')
    return _frame(title, x_label, "", "".join(body), height)


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if log and high > _LOG_FROM * low:
            return cls(low / 1.05, high * 1.05, True)
        spare = (high - low) * 0.04 or abs(high) * 0.04 or 1.0
        return cls(low if low == 0 else low - spare, high + spare)

    def share(self, value: float) -> float:
        """Where between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) < 5 else (1,)
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            return [tick for tick in found if self.low <= tick <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def _x(axis: _Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM)


def _x_ticks(axis: _Axis) -> list[str]:
    return [
        f'<text x="{_x(axis, tick):.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_short(tick)}</text>'
        for tick in axis.ticks()
    ]


def _y_ticks(axis: _Axis) -> list[str]:
    parts = []
    for tick in axis.ticks():
        y = _y(axis, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    return parts


def _legend(named: Sequence[tuple[str, str]]) -> list[str]:
    parts = []
    for number, (name, color) in enumerate(named):
        row, column = divmod(number, _ACROSS)
        x, y = _LEFT + column * (WIDTH - _LEFT) // _ACROSS, HEIGHT + _ROW * row + 4
        parts.append(f'<rect x="{x}" y="{y - 6}" width="14" height="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    return parts


def _frame(title: str, x_label: str, y_label: str, body: str, height: int = HEIGHT, label_y: int | None = None) -> str:
    middle, label_y = (_LEFT + WIDTH) / 2, height - 8 if label_y is None else label_y
    turned = f'<text transform="rotate(-90)" x="{-HEIGHT / 2:.0f}" y="14" text-anchor="middle">{escape(y_label)}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
        f' aria-label="{escape(title)}"><text x="{_LEFT}" y="18" class="title">{escape(title)}</text>{body}'
        f'<text x="{middle:.0f}" y="{label_y}" text-anchor="middle">{escape(x_label)}</text>'
        f"{turned}</svg>"
    )


def _short(value: float) -> str:
    """A tick as a person writes it: 1.5M, 20k, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
