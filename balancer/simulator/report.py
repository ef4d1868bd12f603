"""What a comparison shows: a table for a terminal, a document for programs; `report_html` makes pages with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

from balancer.simulator.experiment import Comparison, Estimate
from balancer.simulator.metrics import Summary

COLUMNS = (
    ("tpot_mean_ms", "TPOT mean ms", 1.0),
    ("tpot_p99_ms", "p99", 1.0),
    ("ttft_mean_ms", "TTFT mean ms", 1.0),
    ("ttft_p99_ms", "p99", 1.0),
    ("output_tokens_per_s", "tokens/s", 1.0),
    ("barrier_waste", "waste %", 100.0),
    ("kv_max_mean", "KV max/mean", 1.0),
    ("requests_max_mean", "req max/mean", 1.0),
    ("regret_us", "regret us", 1.0),
)
"""Metric, its title, and the factor to the unit shown."""


def reference_of(names: Sequence[str]) -> str:
    """What the others are compared with: minimum_tokens, the seed's rule with exact counts, else the first."""
    return "minimum_tokens" if "minimum_tokens" in names else names[0]


def text(comparison: Comparison, capacities: Mapping[str, float] | None = None) -> str:
    """The table; `TPOT change` is against the reference, paired by seed, with its 95 % confidence interval."""
    names = list(comparison.summaries)
    reference = reference_of(names)
    rows = [["", "TPOT change %", *(title for _, title, _ in COLUMNS), *(["capacity/s"] if capacities else [])]]
    for name in names:
        cells = [_change(comparison.change(name, reference, "tpot_mean_ms"), name == reference)]
        cells += [_number(comparison.estimate(name, metric).mean * factor) for metric, _, factor in COLUMNS]
        rows.append([name, *cells, *([_number(capacities[name])] if capacities else [])])
    return "\n".join([_what(comparison), *_aligned(rows)])


def document(comparison: Comparison, capacities: Mapping[str, float] | None = None) -> dict[str, object]:
    """Everything in numbers: the scenario, for each balancer each metric's mean, interval and value by seed."""
    reference = reference_of(list(comparison.summaries))
    scenario = asdict(comparison.scenario)
    return {
        "scenario": scenario,
        "seeds": list(comparison.seeds),
        "reference": reference,
        "balancers": {
            name: {
                "metrics": {
                    metric.name: {
                        "mean": finite(comparison.estimate(name, metric.name).mean),
                        "half_width_95": finite(comparison.estimate(name, metric.name).half_width),
                        "by_seed": [finite(getattr(one, metric.name)) for one in summaries],
                    }
                    for metric in fields(Summary)
                },
                "tpot_change": asdict(comparison.change(name, reference, "tpot_mean_ms")),
                **({"capacity_per_s": finite(capacities[name])} if capacities else {}),
            }
            for name, summaries in comparison.summaries.items()
        },
    }


def finite(value: float) -> float | None:
    """The value, or None (JSON's null) for one without end, or that is unknown."""
    return value if math.isfinite(value) else None


def _what(comparison: Comparison) -> str:
    scenario = comparison.scenario
    requests = next(iter(comparison.summaries.values()))[0].requests
    state = "" if scenario.dispatchers == 1 else ", shared state" if scenario.shared else ", private state"
    return (
        f"{scenario.kind} on {scenario.profile.name}, {scenario.engines} x {scenario.ranks} ranks, "
        f"{scenario.dispatchers} dispatcher{'s' if scenario.dispatchers > 1 else ''}{state}, reports "
        f"{scenario.report_age_s * 1e3:g} ms old; {requests:,} requests measured, {len(comparison.seeds)} seeds"
    )


def _change(change: Estimate, is_reference: bool) -> str:
    if is_reference:
        return "reference"
    shown = f"{change.mean * 100:+.2f}"
    return shown + (f" ± {change.half_width * 100:.2f}" if change.half_width else "")


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "no limit"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return lines
