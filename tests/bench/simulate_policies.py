"""`python -m tests.bench.simulate_policies [PART ...]`: what the policies are worth, simulated on the traces.

Prints a table for each part and writes all numbers as JSON. Decode pools run at a busy operating point: 256 requests
on each rank, or as many as fill 75 % of its KV pool; eight times as many requests as run at once, the first third and
the last tenth not measured. Changes are of the mean TPOT against exact minimum_tokens, paired by seed, with 95 %
confidence intervals where there are several seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from balancer.simulator import H20, H200, EngineKind, Scenario, Stream, simulate
from balancer.simulator.experiment import Comparison, compare, make_balancer
from balancer.simulator.report import text
from balancer.simulator.stream import decode_rate_per_s, prefill_rate_per_s, requests_per_rank, resampled
from balancer.workload import TimedRequest, load_trace, scaled

TRACES = {
    "azure": "azure2023_conv.csv.gz",
    "mooncake": "mooncake_conversation.jsonl.gz",
    "deepseek-r1": "servegen_deepseek_r1.csv.gz",
    "sharegpt": "sharegpt_lengths.csv.gz",
}
"""Chat but for deepseek-r1, which is reasoning, and mooncake, whose prompts are ten times as long."""
PER_RANK, KV_SHARE, TURNOVERS = 256, 0.75, 8
LEAST_REQUESTS = 8_000
OWN = ("round_robin", "minimum_requests", "minimum_tokens", "envelope", "cost_envelope")
ALL = (*OWN, "sglang_total_tokens", "vllm", "seed")
UNIFIED = (*OWN, "pending_envelope", "trial:prefill_envelope")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; `quick` proves nothing."""

    traces: Path
    seeds: int
    quick: bool
    names: Sequence[str] = tuple(TRACES)

    def load(self, name: str) -> list[TimedRequest]:
        return load_trace(self.traces / TRACES[name], rate_per_s=1.0)


def busy(trace: list[TimedRequest], scenario: Scenario, options: Options) -> Callable[[int], Stream]:
    """Streams at the operating point of a decode pool."""
    per_rank = requests_per_rank(trace, scenario, PER_RANK, KV_SHARE)
    rate_per_s = decode_rate_per_s(trace, scenario, per_rank)
    count = max(LEAST_REQUESTS, int(per_rank * scenario.all_ranks * TURNOVERS)) // (8 if options.quick else 1)
    return lambda seed: Stream.of(scaled(resampled(trace, count, seed), rate_per_s=rate_per_s))


def the_seeds_table(options: Options) -> dict[str, Any]:
    """PR 7379's benchmark: 100 and 4,096 ShareGPT prompts at once on 16 ranks with DP attention (H20 and H200)."""
    results = {}
    trace = options.load("sharegpt")
    for count in (100, 512 if options.quick else 4_096):
        for profile in (H20, H200):
            scenario = Scenario(kind=EngineKind.PREFILL_FIRST, profile=profile)

            def at_once(seed: int, count: int = count) -> Stream:
                return Stream.of(scaled(resampled(trace, count, seed), rate_per_s=math.inf))

            seeds = 60 if count == 100 else 5  # a hundred prompts are few: single runs differ by more than policies
            compared = compare((*OWN, "seed"), scenario, at_once, range(max(options.seeds, seeds)))
            print(f"\n{count} prompts at once, prefill first, 16 ranks, {profile.name}; change against round robin, %")
            for name in compared.summaries:
                changes = [compared.change(name, "round_robin", metric) for metric in SEED_METRICS]
                print(f"  {name:17}" + "".join(f"  {t} {_pm(c)}" for t, c in zip(SEED_TITLES, changes, strict=True)))
            results[f"{count}/{profile.name}"] = _document(compared)
    return results


SEED_METRICS = ("ttft_mean_ms", "ttft_p99_ms", "itl_mean_ms")
SEED_TITLES = ("TTFT mean", "TTFT p99", "ITL mean")


def decode_only(options: Options) -> dict[str, Any]:
    """Decode pools of 16 and 64 ranks: the four traces on both profiles."""
    results: dict[str, Any] = {}
    for ranks, names in ((16, ALL), (64, OWN)):
        for trace_name in options.names:
            trace = options.load(trace_name)
            for profile in (H200, H20):
                scenario = Scenario(ranks=ranks, profile=profile, warm_up=0.35, cool_down=0.1)
                compared = compare(names, scenario, busy(trace, scenario, options), range(options.seeds))
                print(f"\n{trace_name}: {text(compared)}", flush=True)
                results[f"{ranks}/{trace_name}/{profile.name}"] = _document(compared)
    for ranks in (16, 64):
        cells = [cell for key, cell in results.items() if key.startswith(f"{ranks}/")]
        for name in ("envelope", "cost_envelope"):
            changes = [cell[name]["tpot_change"] for cell in cells]
            print(f"\n{ranks} ranks: {name} against exact minimum_tokens, mean TPOT, {len(cells)} cells:", end=" ")
            print(f"mean {100 * statistics.fmean(changes):+.2f} %, worst {100 * max(changes):+.2f} %")
    return results


def many_dispatchers(options: Options) -> dict[str, Any]:
    """Sixteen dispatchers with reports 100 ms old, state shared or private, beside one dispatcher."""
    results: dict[str, Any] = {}
    print(f"\n{'reports 100 ms old, 16 ranks':46}{'16 shared':>12}{'16 private':>12}{'1, reports fresh':>18}")
    for policy in ("envelope", "minimum_tokens"):
        for trace_name in options.names:
            trace = options.load(trace_name)
            for profile in (H200, H20):
                one = Scenario(profile=profile, report_age_s=0.1, warm_up=0.35, cool_down=0.1)
                stream_of = busy(trace, one, options)
                sides = {
                    "one": one,
                    "shared": replace(one, dispatchers=16),
                    "private": replace(one, dispatchers=16, shared=False),
                    "fresh": replace(one, report_age_s=0.0),
                }
                tpot = {
                    side: compare([policy], scenario, stream_of, range(options.seeds))
                    .estimate(policy, "tpot_mean_ms")
                    .mean
                    for side, scenario in sides.items()
                }
                change = {side: tpot[side] / tpot["one"] - 1 for side in ("shared", "private", "fresh")}
                results[f"{policy}/{trace_name}/{profile.name}"] = {"tpot_ms": tpot, "change": change}
                what = f"{policy}, {trace_name}, {profile.name}"
                print(f"{what:46}" + "".join(f"{100 * change[s]:+11.2f}%" for s in ("shared", "private")), end="")
                print(f"{100 * change['fresh']:+17.2f}%", flush=True)
    return results


def unified(options: Options) -> dict[str, Any]:
    """Unified engines of 16 ranks, SGLang's order and vLLM's, at 20 % of the time for prefill; at 10 % with giants.

    Each rank alone would prefill for that share; the others wait with it, so 20 % is a pool that is busy with it.
    """
    results: dict[str, Any] = {}
    for kind in (EngineKind.PREFILL_FIRST, EngineKind.MIXED):
        for trace_name in options.names:
            trace = options.load(trace_name)
            # Mooncake's requests are ten times as long, and so are its days.
            count = 1_000 if options.quick else 2_000 if trace_name == "mooncake" else 8_000
            for profile in (H200, H20):
                scenario = Scenario(kind=kind, profile=profile, warm_up=0.25, cool_down=0.1)
                rate_per_s = prefill_rate_per_s(trace, scenario, 0.1 if trace_name == "mooncake" else 0.2)

                def stream(
                    seed: int, trace: list[TimedRequest] = trace, rate: float = rate_per_s, count: int = count
                ) -> Stream:
                    return Stream.of(scaled(resampled(trace, count, seed), rate_per_s=rate))

                compared = compare(UNIFIED, scenario, stream, range(options.seeds))
                print(f"\n{kind}, {trace_name}, {profile.name}; change against minimum_tokens, %")
                for name in UNIFIED:
                    changes = [compared.change(name, "minimum_tokens", metric) for metric in UNIFIED_METRICS]
                    shown = [f"  {t} {_pm(c)}" for t, c in zip(UNIFIED_TITLES, changes, strict=True)]
                    print(f"  {name:22}" + "".join(shown), flush=True)
                results[f"{kind}/{trace_name}/{profile.name}"] = _document(compared)
    return results


UNIFIED_METRICS = ("tpot_mean_ms", "ttft_mean_ms", "ttft_p99_ms")
UNIFIED_TITLES = ("TPOT mean", "TTFT mean", "TTFT p99")


def speed(options: Options) -> dict[str, Any]:
    """Requests simulated per minute, 16 ranks, one core."""
    results = {}
    trace = options.load("azure")
    scenario = Scenario()
    stream = busy(trace, scenario, options)(0)
    print()
    for name in (*ALL, "power_of_two", "random", "lua:minimum_tokens"):
        piece = _cut(stream, 2_000) if name.startswith("lua:") else stream
        begun = time.process_time()
        simulate(piece, scenario, make_balancer(name))
        results[name] = len(piece) / (time.process_time() - begun) * 60
        print(f"{name:20} {results[name]:12,.0f} requests per minute of processor time, 16 ranks")
    return results


def _cut(stream: Stream, count: int) -> Stream:
    columns = (stream.arrival_s[:count], stream.input_tokens[:count], stream.output_tokens[:count])
    return Stream(*columns, stream.ids[:count])


PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "seed": the_seeds_table,
    "decode": decode_only,
    "dispatchers": many_dispatchers,
    "unified": unified,
    "speed": speed,
}


def _document(compared: Comparison) -> dict[str, Any]:
    reference = "minimum_tokens"
    return {
        name: {
            "tpot_change": compared.change(name, reference, "tpot_mean_ms").mean,
            "by_seed": [one.as_json() for one in summaries],
        }
        for name, summaries in compared.summaries.items()
    }


def _pm(change: Any) -> str:
    return f"{100 * change.mean:+7.2f} ± {100 * change.half_width:5.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.simulate_policies", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which: {', '.join(PARTS)} (default all)")
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="where the traces are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trace", action="append", choices=list(TRACES), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, as JSON")
    parser.add_argument("--quick", action="store_true", help="few requests: shows that it works, proves nothing")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if not arguments.traces.is_dir():
        parser.error(f"no traces in {arguments.traces}: give --traces")
    options = Options(arguments.traces, arguments.seeds, arguments.quick, arguments.trace or tuple(TRACES))
    results = {}
    for name in arguments.parts or PARTS:
        begun = time.monotonic()
        results[name] = PARTS[name](options)
        print(f"({name}: {time.monotonic() - begun:.0f} s)", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
