"""`python -m tests.bench.serve.stacks`: which HTTP stack carries `balancer serve`, by measurement.

Every stack of `proxies.py` stands in turn before the same stub engine, in several rounds whose order is reversed each
time; the least disturbed round counts. The reference is the same load without a proxy. Needs aiohttp, uvloop, uvicorn,
httptools, granian, httpx and orjson in the interpreter named by --python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from tests.bench.serve.harness import Load, Measured, least_disturbed, measure, process, stub, write

PROXY, ENGINE, SPACED_ENGINE = 9510, 9501, 9502
LOADS = (
    Load(1),
    Load(64),
    Load(8, body=65536),
    Load(16, stream=True),
    Load(1, stream=True, spaced=True),
    Load(32, stream=True, spaced=True, rate=40),
)
PACKAGES = "aiohttp uvloop uvicorn httptools granian httpx"
VERSIONS = f"import importlib.metadata as m; print({{name: m.version(name) for name in '{PACKAGES}'.split()}})"


def main() -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serve.stacks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="STACK", help="which (default all)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the stacks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one load (default %(default)s)")
    options = parser.parse_args()
    listing = [options.python, "-c", "from tests.bench.serve.proxies import STACKS; print(*STACKS, sep='\\n')"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\n")
    names = ["direct", *(options.names or filter(None, names))]
    versions = subprocess.run([options.python, "-c", VERSIONS], capture_output=True, text=True).stdout.strip()
    runs: dict[str, list[list[Measured]]] = {name: [] for name in names}
    with stub(ENGINE), stub(SPACED_ENGINE, gap_us=5000):
        order = list(names)
        for round_number in range(options.rounds):
            for name in order:
                print(f"round {round_number + 1}: {name}", file=sys.stderr, flush=True)
                runs[name].append(_one(name, options.python, options.seconds))
            order.reverse()
    results = {
        name: {load.name: least_disturbed([run[i] for run in runs[name]]) for i, load in enumerate(LOADS)}
        for name in names
    }
    print(versions)
    print(table(results, LOADS, "direct"))
    path = write("stacks.json", {name: {load: asdict(m) for load, m in row.items()} for name, row in results.items()})
    print(f"all numbers: {path}")
    return 0


def _one(name: str, python: str, seconds: float) -> list[Measured]:
    if name == "direct":
        return [measure([], SPACED_ENGINE if load.spaced else ENGINE, load, seconds) for load in LOADS]
    measured: dict[Load, Measured] = {}
    for spaced in (False, True):
        command = [python, "-m", "tests.bench.serve.proxies", name, PROXY, SPACED_ENGINE if spaced else ENGINE]
        with process([str(word) for word in command], PROXY) as pid:
            measure([pid], PROXY, Load(8), 0.5)
            measured |= {load: measure([pid], PROXY, load, seconds) for load in LOADS if load.spaced == spaced}
    return [measured[load] for load in LOADS]


def table(results: dict[str, dict[str, Measured]], loads: Sequence[Load], direct: str) -> str:
    """One Markdown table per load; latencies are what the proxy adds to the direct way's."""
    lines = []
    for load in loads:
        lines += [
            f"\n**{load.name}**\n",
            "| stack | added p50 µs | added p99 µs | added first byte p50 µs | p99 | CPU µs/request | and in Redis "
            "| req/s | req/s per core | RSS MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        base = results[direct][load.name]
        for name, row in results.items():
            m = row[load.name]
            if name == direct:
                shown = (
                    f"({m.p50_us:.0f}) | ({m.p99_us:.0f}) | ({m.first_p50_us:.0f}) | ({m.first_p99_us:.0f}) | - | - "
                )
                lines.append(f"| {name} | {shown}| {m.requests_per_s:.0f} | - | - |")
                continue
            per_core = 1e6 / (m.cpu_us + m.redis_cpu_us) if m.cpu_us else float("nan")
            lines.append(
                f"| {name} | {m.p50_us - base.p50_us:.0f} | {m.p99_us - base.p99_us:.0f} "
                f"| {m.first_p50_us - base.first_p50_us:.0f} | {m.first_p99_us - base.first_p99_us:.0f} "
                f"| {m.cpu_us:.0f} | {m.redis_cpu_us:.0f} | {m.requests_per_s:.0f} | {per_core:.0f} | {m.rss_mib:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
