"""The demo's one table: a line per figure, a column per policy, and the change from the first to the last."""

from __future__ import annotations

from collections.abc import Mapping

_TITLES = {
    "requests": "requests finished",
    "duration_s": "duration (s)",
    "input_tokens_per_s": "input throughput (tok/s)",
    "output_tokens_per_s": "output throughput (tok/s)",
    "ttft": "TTFT",
    "itl": "ITL",
    "e2e": "E2E latency",
    "dispatch": "dispatch",
    "held_max_over_mean": "held tokens, max/mean",
}
_SPREAD_OVER = ("duration_s", "ttft_mean_ms", "itl_mean_ms", "e2e_mean_ms", "held_max_over_mean", "dispatch_mean_ms")


def render(results: Mapping[str, Mapping[str, float]]) -> str:
    """`results` holds the figures of each policy; returns the table, without a final line break."""
    policies = list(results)
    first, last = results[policies[0]], results[policies[-1]]
    rows = [("", *policies, "change" if len(policies) > 1 else "")]
    for name in first:
        if name in _SPREAD_OVER:
            rows.append(("",) * len(rows[0]))
        change = f"{100 * (last[name] / first[name] - 1):+.1f} %" if len(policies) > 1 and first[name] else ""
        rows.append((_title(name), *(_number(name, results[policy][name]) for policy in policies), change))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    measure, statistic, unit = name.split("_")
    return f"{_TITLES[measure]} {statistic} ({unit})"


def _number(name: str, value: float) -> str:
    if name == "requests":
        return f"{value:,.0f}"
    return f"{value:,.2f}" if value < 100 or name == "held_max_over_mean" else f"{value:,.0f}"
