"""The replay's table: for each figure the live value, the simulated one, and by how much each differs from the first
policy's."""

from __future__ import annotations

from balancer.simulator import Comparison

FIGURES = (
    ("barrier_waste", "barrier waste, % of step time", 100.0),
    ("kv_max_mean", "held tokens, max/mean", 1.0),
    ("requests_max_mean", "requests, max/mean", 1.0),
    ("tpot_mean_ms", "TPOT mean, ms", 1.0),
    ("ttft_mean_ms", "TTFT mean, ms", 1.0),
    ("ttft_p99_ms", "TTFT p99, ms", 1.0),
    ("output_tokens_per_s", "output tokens/s", 1.0),
)
"""Metric of `Summary`, its title, and the factor to the unit shown. The first three are computed from counts."""


def render(live: Comparison, simulated: Comparison) -> str:
    """Both, without a final line break; changes are against the first policy, paired by round."""
    policies = list(live.summaries)
    rows = [["", "policy", "live", "simulated", *(["change live", "simulated"] if len(policies) > 1 else [])]]
    for metric, title, factor in FIGURES:
        for policy in policies:
            cells = [_number(side.estimate(policy, metric).mean * factor) for side in (live, simulated)]
            if len(policies) > 1:
                cells += [_change(side, policy, policies[0], metric) for side in (live, simulated)]
            rows.append([title if policy == policies[0] else "", policy, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*words, *numbers]).rstrip())
    return "\n".join(lines)


def _change(side: Comparison, policy: str, first: str, metric: str) -> str:
    return "" if policy == first else f"{100 * side.change(policy, first, metric).mean:+.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
