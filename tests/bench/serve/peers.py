"""`python -m tests.bench.serve.peers`: `balancer serve` beside sglang-router and smg, over the same stub engines.

    cost      added latency, first byte of streams, CPU, memory; each router alone, in several rounds, in turn
    single    one connection: first byte and CPU of a request that comes alone, beside the least that can be done
              (`proxies.py`: llhttp and one EVALSHA of the dispatch script, nothing else); short rounds in turn
    replicas  throughput and CPU of 1, 2 and 4 replicas that may use a share of a core each
    balance   1, 4 and 8 replicas, the same requests for all: how far the fullest rank is above the mean

Peers are programs of their own, in environments of their own (`--sglang-router`, `--smg`: the bin folder with them).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from balancer.embedded import EmbeddedRedis
from tests.bench.serve.harness import Load, Measured, least_disturbed, measure, process, stub, write
from tests.bench.serve.routers import ENGINE, FLOOR, FRONT, OURS, SPACED_ENGINE, Router, ours, peers, running
from tests.bench.serve.scale import balance, replicas, table_of_balance, table_of_replicas
from tests.bench.serve.stacks import table

LOADS = (
    Load(1),
    Load(64),
    Load(8, body=65536),
    Load(1, stream=True),
    Load(16, stream=True),
    Load(1, stream=True, spaced=True),
    Load(32, stream=True, spaced=True, rate=40),
)
ALONE = (Load(1, stream=True, spaced=True), Load(1, stream=True), Load(1))


def cost(options: argparse.Namespace) -> dict[str, dict[str, Measured]]:
    """Every load on every router, alone, and straight on the stub engine."""
    with EmbeddedRedis() as server, stub(ENGINE), stub(SPACED_ENGINE, gap_us=5000):
        theirs = {router.name: router for router in peers(options, "round_robin")}
        runs: dict[str, list[dict[Load, Measured]]] = {name: [] for name in ["direct", OURS, *theirs]}
        order = list(runs)
        for number in range(options.rounds):
            for name in order:
                print(f"cost, round {number + 1}: {name}", file=sys.stderr, flush=True)
                measured: dict[Load, Measured] = {}
                for engine, spaced in ((ENGINE, False), (SPACED_ENGINE, True)):
                    loads = [load for load in LOADS if load.spaced == spaced]
                    if name == "direct":
                        measured |= {load: measure([], engine, load, options.seconds) for load in loads}
                        continue
                    router = theirs.get(name) or _alone(server.url, spaced)
                    with running(router, FRONT, [f"http://127.0.0.1:{engine}"]) as pid:
                        measure([pid], FRONT, Load(8), 0.5)
                        redis = None if name in theirs else server.pid
                        measured |= {load: measure([pid], FRONT, load, options.seconds, redis) for load in loads}
                runs[name].append(measured)
            order.reverse()
    return {
        name: {load.name: least_disturbed([run[load] for run in rows]) for load in LOADS} for name, rows in runs.items()
    }


def single(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """One connection: of each load and router the median over the rounds, and the CPU of Redis beside our own."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis())
        stack.enter_context(stub(ENGINE))
        stack.enter_context(stub(SPACED_ENGINE, gap_us=5000))
        theirs = peers(options, "round_robin")
        fronts: dict[tuple[str, bool], tuple[int, list[int]]] = {}
        begun = [(router, spaced) for spaced in (False, True) for router in (_alone(server.url, spaced), *theirs)]
        for number, (router, spaced) in enumerate(begun):
            port, engine = FRONT + number, SPACED_ENGINE if spaced else ENGINE
            pid = stack.enter_context(running(router, port, [f"http://127.0.0.1:{engine}"]))
            fronts[router.name, spaced] = port, [pid]
        for spaced in (False, True):
            port, engine = FRONT + 15 + spaced, SPACED_ENGINE if spaced else ENGINE
            floor = [sys.executable, "-m", "tests.bench.serve.proxies", FLOOR, str(port), str(engine), server.url]
            fronts[FLOOR, spaced] = port, [stack.enter_context(process(floor, port))]
            fronts["direct", spaced] = engine, []
        names = ["direct", FLOOR, OURS, *(router.name for router in theirs)]
        runs: dict[str, dict[str, list[Measured]]] = {name: {load.name: [] for load in ALONE} for name in names}
        for load in ALONE:
            order = list(names)
            for number in range(options.rounds):
                print(f"single, {load.name}, round {number + 1}", file=sys.stderr, flush=True)
                for name in order:
                    port, pids = fronts[name, load.spaced]
                    runs[name][load.name].append(measure(pids, port, load, options.seconds, server.pid))
                order.reverse()
    return {name: {load: _medians(found) for load, found in row.items()} for name, row in runs.items()}


def _alone(redis_url: str, spaced: bool) -> Router:
    """`balancer serve` in a pool that no other engine is in: others' ranks would have to be avoided."""
    return ours(redis_url, f"spaced-{spaced}")


def _medians(runs: Sequence[Measured]) -> dict[str, float]:
    rows = [asdict(run) for run in runs]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def table_of_single(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line for each router and load; times and CPU in µs."""
    lines = [
        "\n| load | way | first byte p50 | p99 | last byte p50 | CPU per request | and in Redis |",
        "|---" * 7 + "|",
    ]
    for load in ALONE:
        for name, row in results.items():
            m = row[load.name]
            lines.append(
                f"| {load.name} | {name} | {m['first_p50_us']:.0f} | {m['first_p99_us']:.0f} | {m['p50_us']:.0f} "
                f"| {m['cpu_us']:.0f} | {m['redis_cpu_us']:.0f} |"
            )
    return "\n".join(lines)


def per_chunk(results: dict[str, dict[str, Measured]]) -> str:
    """CPU of a streamed chunk: what a stream of 33 events 5 ms apart costs more than a plain answer, by 33."""
    plain, spaced = Load(64).name, Load(32, stream=True, spaced=True, rate=40).name
    lines = ["\n| | CPU µs per plain request | CPU µs per chunk, chunks 5 ms apart |", "|---|---|---|"]
    for name, row in results.items():
        if name != "direct":
            lines.append(f"| {name} | {row[plain].cpu_us:.0f} | {(row[spaced].cpu_us - row[plain].cpu_us) / 33:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serve.peers", description=__doc__.split("\n")[0])
    parser.add_argument(
        "parts", nargs="*", choices=["cost", "single", "replicas", "balance", []], help="which (default all)"
    )
    parser.add_argument("--sglang-router", metavar="BIN", help="bin folder of a venv with sglang-router 0.3.2")
    parser.add_argument("--smg", metavar="BIN", help="bin folder of a venv with smg 1.13")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one load (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seeds", type=int, default=4, help="of the balance's requests (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--balance-seconds", type=float, default=15.0)
    parser.add_argument("--arrivals", type=float, default=40.0, help="requests per second (default %(default)s)")
    options = parser.parse_args()
    parts = options.parts or ["cost", "single", "replicas", "balance"]
    document: dict[str, Any] = {}
    if "cost" in parts:
        results = cost(options)
        print(table(results, LOADS, "direct") + "\n" + per_chunk(results), flush=True)
        document["cost"] = {name: {load: asdict(m) for load, m in row.items()} for name, row in results.items()}
    if "single" in parts:
        document["single"] = alone = single(options)
        print(table_of_single(alone), flush=True)
    if "replicas" in parts:
        document["replicas"] = scale = replicas(options)
        print(table_of_replicas(scale), flush=True)
    if "balance" in parts:
        document["balance"] = spreads = balance(options)
        print(table_of_balance(spreads), flush=True)
    print(f"all numbers: {write('peers-' + '-'.join(parts) + '.json', document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
