"""What several replicas of `balancer serve` are worth: their throughput, and how evenly they place together."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from balancer.embedded import EmbeddedRedis
from balancer.simulator.experiment import Estimate
from tests.bench.serve import spread
from tests.bench.serve.harness import Load, cpu_s, limited, measure, stub
from tests.bench.serve.routers import ENGINE, FRONT, RANKS, ours, peers, running

SHARE = 0.2
"""Of a core for each replica, so that four, Redis, the stub engine and the load fit on two cores."""
EACH = Load(8)
"""What each replica gets: as many connections however many replicas there are."""
COUNTS = (1, 2, 4)


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    """Requests per second of 1, 2 and 4 replicas that may use so much of a core each, and the CPU of a request."""
    rate: dict[int, list[float]] = {count: [] for count in COUNTS}
    cost: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis())
        engine = stack.enter_context(stub(ENGINE))
        router = ours(server.url, "replicas")
        pids = []
        for number in range(max(COUNTS)):
            pids.append(stack.enter_context(running(router, FRONT + number, [f"http://127.0.0.1:{ENGINE}"])))
            stack.enter_context(limited(pids[-1], SHARE))
        shown = {"replicas": pids, "redis": [server.pid], "stub engine": [engine]}
        for round_number in range(options.rounds):
            for count in COUNTS if round_number % 2 == 0 else reversed(COUNTS):
                print(f"replicas: {count}, round {round_number + 1}", file=sys.stderr, flush=True)
                before = {name: sum(map(cpu_s, group)) for name, group in shown.items()}
                with ThreadPoolExecutor(count) as threads:
                    ports = range(FRONT, FRONT + count)
                    jobs = [threads.submit(measure, [], port, EACH, options.seconds) for port in ports]
                    done = sum(job.result().requests_per_s for job in jobs)
                rate[count].append(done)
                spent = {name: sum(map(cpu_s, group)) - before[name] for name, group in shown.items()}
                cost[count].append({name: 1e6 * s / (done * options.seconds) for name, s in spent.items()})
    one = statistics.median(rate[1])
    return {
        str(count): {
            "requests_per_s": statistics.median(rate[count]),
            "of_as_many_single_ones": statistics.median(rate[count]) / (count * one),
            "cpu_us_per_request": {name: statistics.median(c[name] for c in cost[count]) for name in shown},
        }
        for count in COUNTS
    }


def table_of_replicas(found: dict[str, Any]) -> str:
    """One line for each number of replicas."""
    lines = [
        f"\n| replicas, each on {SHARE:.0%} of a core | requests/s | of as many single ones "
        "| CPU µs per request: replicas | Redis | stub engine |",
        "|---" * 6 + "|",
    ]
    for count, row in found.items():
        cpu = " | ".join(f"{value:.0f}" for value in row["cpu_us_per_request"].values())
        lines.append(f"| {count} | {row['requests_per_s']:.0f} | {row['of_as_many_single_ones']:.2f} | {cpu} |")
    return "\n".join(lines)


def balance(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Max/mean held tokens over the ranks, by router and number of replicas, each before ranks of its own.

    All get the same requests at the same moments, seed after seed, so that what differs between two of them is compared
    seed by seed. The first number stands twice: how far it is from itself is the noise of the measurement.
    """
    counts = (options.replicas[0], *options.replicas)
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis())
        theirs = [router for router in peers(options, "cache_aware") if router.name == "sglang-router"]
        port, first_rank = FRONT, RANKS
        scenes: list[tuple[str, int, spread.Ranks, list[int]]] = []
        for number, count in enumerate(counts):
            for router in (ours(server.url, f"balance-{number}"), *theirs):
                print(f"balance: starting {count} x {router.name}", file=sys.stderr, flush=True)
                ranks = stack.enter_context(spread.Ranks(range(first_rank, first_rank + options.ranks)))
                first_rank += options.ranks
                fronts = list(range(port, port + count))
                port += count
                assert port < RANKS, "ports of replicas and ranks overlap"
                for front in fronts:
                    stack.enter_context(running(router, front, ranks.urls))
                scenes.append((router.name, count, ranks, fronts))
        played: list[list[float]] = [[] for _ in scenes]
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            print(f"balance: seed {seed}", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(len(scenes)) as threads:
                jobs = [
                    threads.submit(ranks.play, fronts, options.balance_seconds, options.arrivals, seed)
                    for _, _, ranks, fronts in scenes
                ]
                for job, ratios in zip(jobs, played, strict=True):
                    ratios.append(job.result()["max_over_mean"])
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, count, _, _), ratios in zip(scenes, played, strict=True):
        rows = found.setdefault(name, [])
        base = rows[0]["max_over_mean"] if rows else ratios
        change = Estimate.of([100 * (ratio / first - 1) for ratio, first in zip(ratios, base, strict=True)])
        rows.append(
            {"replicas": count, "max_over_mean": ratios, "change_percent": change.mean, "half_width": change.half_width}
        )
    return found


def table_of_balance(found: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each router; changes against its first column, seed by seed, with their 95 % intervals."""
    counts: Sequence[int] = [row["replicas"] for row in next(iter(found.values()))]
    head = [f"{count} again" if number == 1 else f"{count}" for number, count in enumerate(counts)]
    lines = ["\n| max/mean held tokens by replicas | " + " | ".join(head) + " |", "|---" * (1 + len(counts)) + "|"]
    for name, rows in found.items():
        cells = [f"{statistics.fmean(rows[0]['max_over_mean']):.3f}"]
        for row in rows[1:]:
            change = f"{row['change_percent']:+.1f} % ± {row['half_width']:.1f}"
            cells.append(f"{statistics.fmean(row['max_over_mean']):.3f} ({change})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
