"""What the probe has taken inside SGLang's processes (`dpb_probe`), as a table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

PROBE = Path(__file__).parent


def costs(folder: Path) -> str:
    """p50 and p99 of what was taken, in microseconds."""
    taken: dict[str, list[float]] = {}
    for file in folder.glob("*.json"):
        for what, seconds in json.loads(file.read_text()).items():
            taken.setdefault(what, []).extend(seconds)
    lines = [f"{'inside the engine':<22}{'p50 (us)':>12}{'p99 (us)':>12}{'calls':>10}"]
    for what, seconds in sorted(taken.items()):
        cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
        lines.append(f"{what:<22}{cuts[49] * 1e6:>12,.0f}{cuts[98] * 1e6:>12,.0f}{len(seconds):>10,}")
    return "\n".join(lines)
