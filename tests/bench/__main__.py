"""`python -m tests.bench [NAME ...]`: run benchmarks, print a table for each, write all numbers as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from balancer.embedded import EmbeddedRedis
from tests.bench import gather, hand_over, library, memory, policies, report, server_time, throughput
from tests.bench.measuring import Row, table

Benchmark = Callable[[EmbeddedRedis, bool], list[Row]]

BENCHMARKS: dict[str, Benchmark] = {
    "throughput": throughput.single,
    "lists": throughput.lists,
    "server-time": server_time.by_ranks,
    "in-flight": server_time.in_flight,
    "among": server_time.among,
    "policies": policies.server_time,
    "latency": library.latency,
    "memory": memory.per_id,
    "report": report.server_time,
    "hand-over": hand_over.on_step_thread,
    "gather": gather.among_processes,
}


def main() -> int:
    """Run what was asked for. A missed target is a finding, not a failure: the table says so."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} (default all)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench.json"), help="where the numbers go (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, proves nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(BENCHMARKS)}")
    results: dict[str, list[Row]] = {}
    for name in options.names or BENCHMARKS:
        begun = time.monotonic()
        with EmbeddedRedis() as server:
            results[name] = BENCHMARKS[name](server, options.quick)
        print(table(f"{name} ({time.monotonic() - begun:.0f} s)", results[name]) + "\n", flush=True)
    missed = [result for rows in results.values() for result in rows if result.met is False]
    print(f"{len(missed)} of {sum(r.target is not None for rows in results.values() for r in rows)} targets missed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(_document(results, options.quick), indent=2) + "\n", encoding="utf-8")
    return 0


def _document(results: dict[str, list[Row]], quick: bool) -> dict[str, object]:
    return {
        "quick": quick,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "results": {name: [result.as_json() for result in rows] for name, rows in results.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
