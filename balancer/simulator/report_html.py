"""One page that shows a comparison: its table and its plots, in one file that needs no other."""

from __future__ import annotations

from html import escape
from operator import attrgetter

from balancer.simulator.experiment import Comparison
from balancer.simulator.metrics import quantile, tpot_ms, ttft_ms
from balancer.simulator.recorder import Sample
from balancer.simulator.report import reference_of, text
from balancer.simulator.simulation import Run
from balancer.simulator.svg import PALETTE, Dot, Line, dot_plot, line_plot

_POINTS = 160
"""Points of a line over time: as many as a plot has room for."""
_SHARES = [step / 100 for step in range(100)] + [0.995, 0.999, 1.0]
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}
svg{font:11px system-ui,sans-serif;fill:#333;margin:.4em .6em .4em 0}svg .title{font-size:13px;font-weight:600}
pre{overflow-x:auto;background:#f6f6f6;padding:1em;font-size:12px}h2{margin:1.6em 0 .2em}p{max-width:75ch}
"""


def page(comparison: Comparison, title: str, capacities: dict[str, float] | None = None) -> str:
    """The page as HTML."""
    sections = [
        "<h2>In numbers</h2>",
        f"<pre>{escape(text(comparison, capacities))}</pre>",
        "<h2>Compared</h2>",
        "<p>Means over the seeds; bars are 95 % confidence intervals, of the differences paired by seed.</p>",
        *_compared(comparison),
        "<h2>Latency</h2>",
        "<p>The share of requests (first seed) that are at most this slow.</p>",
        *_distributions(comparison),
        "<h2>Imbalance over time</h2>",
        "<p>The largest rank's tokens, and the largest one's requests, over the mean (first engine, first seed, the"
        " measured part). At 1 nobody waits for anybody.</p>",
        *_imbalance(comparison),
        "<h2>Load of each rank over time</h2>",
        "<p>Held tokens, one line for each rank of the first engine; the black line is their mean.</p>",
        *_loads(comparison),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _colors(comparison: Comparison) -> dict[str, str]:
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(comparison.summaries)}


def _compared(comparison: Comparison) -> list[str]:
    colors, names = _colors(comparison), list(comparison.summaries)
    reference = reference_of(names)
    plots = []
    for metric, title in (("tpot_mean_ms", "TPOT, mean"), ("ttft_p99_ms", "TTFT, p99")):
        changes = {name: comparison.change(name, reference, metric) for name in names}
        dots = [Dot(name, 100 * one.mean, 100 * one.half_width, colors[name]) for name, one in changes.items()]
        plots.append(dot_plot(title, f"% against {reference} (left is better)", dots))
    wastes = {name: comparison.estimate(name, "barrier_waste") for name in names}
    dots = [Dot(name, 100 * one.mean, 100 * one.half_width, colors[name]) for name, one in wastes.items()]
    plots.append(dot_plot("Barrier waste", "% of step time that perfect balance would remove", dots))
    return plots


def _distributions(comparison: Comparison) -> list[str]:
    colors, plots = _colors(comparison), []
    for label, values_of in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        lines = []
        for name, run in comparison.runs.items():
            values = sorted(values_of(run))
            points = [(quantile(values, share), 100 * share) for share in _SHARES] if values else []
            lines.append(Line(name, points, colors[name]))
        plots.append(line_plot(label, f"{label} in ms", "% of requests", lines, log_x=True))
    return plots


def _imbalance(comparison: Comparison) -> list[str]:
    colors, plots = _colors(comparison), []
    for title, counts_of in (("Tokens", attrgetter("held")), ("Requests", attrgetter("requests"))):
        lines = []
        for name, run in comparison.runs.items():
            samples = [sample for sample in _shown(run) if sample.now_s >= run.recorder.from_s and any(sample.requests)]
            counts = [(sample.now_s, counts_of(sample)) for sample in samples]
            points = [(now_s, max(ranks) * len(ranks) / sum(ranks)) for now_s, ranks in counts]
            lines.append(Line(name, _smoothed(points), colors[name]))
        plots.append(line_plot(f"{title}, max/mean", "seconds", "max/mean", lines))
    return plots


def _loads(comparison: Comparison) -> list[str]:
    series = {name: _thinned(_shown(run)) for name, run in comparison.runs.items()}
    highest = max((max(sample.held) for samples in series.values() for sample in samples), default=1)
    plots = []
    for name, samples in series.items():
        ranks = len(samples[0].held) if samples else 0
        lines = [
            Line("", [(sample.now_s, sample.held[rank]) for sample in samples], PALETTE[rank % len(PALETTE)], 0.8, 0.6)
            for rank in range(ranks)
        ]
        mean = [(sample.now_s, sum(sample.held) / ranks) for sample in samples]
        plots.append(
            line_plot(name, "seconds", "tokens", [*lines, Line("", mean, "#000000", 1.4)], y_range=(0, highest))
        )
    return plots


def _shown(run: Run) -> list[Sample]:
    """The first engine, until what is measured ends: an emptying pool is no example of anything."""
    return [sample for sample in run.recorder.samples if sample.engine == 0 and sample.now_s <= run.recorder.until_s]


def _thinned(samples: list[Sample]) -> list[Sample]:
    return samples[:: max(1, -(-len(samples) // _POINTS))]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that lines that cross all the time can be told apart."""
    group = max(1, -(-len(points) // (_POINTS // 2)))
    pieces = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]
