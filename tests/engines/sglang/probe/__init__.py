"""What the probe has taken inside SGLang's processes (`dpb_probe`), as a table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

PROBE = Path(__file__).parent


def taken_in(folder: Path) -> dict[str, list[float]]:
    """What was taken, in seconds, of all processes together."""
    taken: dict[str, list[float]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            for what, seconds in json.loads(line).items():
                taken.setdefault(what, []).extend(seconds)
    return taken


def costs(folder: Path) -> str:
    """p50 and p99 of what was taken, in microseconds."""
    lines = [f"{'inside the engine':<22}{'p50 (us)':>12}{'p99 (us)':>12}{'calls':>10}"]
    for what, seconds in sorted(taken_in(folder).items()):
        cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
        lines.append(f"{what:<22}{cuts[49] * 1e6:>12,.0f}{cuts[98] * 1e6:>12,.0f}{len(seconds):>10,}")
    return "\n".join(lines)
