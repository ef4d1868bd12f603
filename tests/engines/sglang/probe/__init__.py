"""What the probe has taken inside SGLang's processes (`dpb_probe`), as a table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

PROBE = Path(__file__).parent


def taken_in(folder: Path) -> dict[str, list[float]]:
    """What was taken, in seconds (of what is counted, numbers), of all processes together."""
    taken: dict[str, list[float]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            for what, seconds in json.loads(line).items():
                taken.setdefault(what, []).extend(seconds)
    return taken


def costs(folder: Path) -> str:
    """p50 and p99 of what was taken, in microseconds."""
    lines = [f"{'inside the engine':<22}{'p50 (us)':>12}{'p99 (us)':>12}{'calls':>10}"]
    taken = taken_in(folder)
    placed, left = (sum(taken.pop(what, ())) for what in ("by the pool", "by SGLang"))
    for what, seconds in sorted(taken.items()):
        cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
        lines.append(f"{what:<22}{cuts[49] * 1e6:>12,.0f}{cuts[98] * 1e6:>12,.0f}{len(seconds):>10,}")
    if placed or left:
        lines.append(f"{placed / (placed + left):.1%} of {placed + left:,.0f} requests were placed by the pool")
    return "\n".join(lines)
