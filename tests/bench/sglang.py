"""`make bench-sglang`: the seed's table on a real SGLang, 100 prompts, round robin beside minimum tokens.

Two servers of the same SGLang, one plain (its own round robin), one with dp-balancer in it; SGLang's own bench client
speaks to both in turn, as many rounds as asked for, in alternating order, and each figure is the median of its rounds.
What dp-balancer costs inside the engine is taken by a probe and stands below the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from balancer.embedded import EmbeddedRedis
from scheduler_hooks.demo.table import render
from tests.engines.sglang.probe import PROBE, costs
from tests.engines.sglang.server import KIT, ROOT, SGLangServer, engines_home, what_is_missing

FIGURES = {
    "requests": "completed",
    "duration_s": "duration",
    "input_tokens_per_s": "input_throughput",
    "output_tokens_per_s": "output_throughput",
    "ttft_mean_ms": "mean_ttft_ms",
    "ttft_median_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_mean_ms": "mean_itl_ms",
    "itl_median_ms": "median_itl_ms",
    "itl_p95_ms": "p95_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "e2e_mean_ms": "mean_e2e_latency_ms",
    "e2e_median_ms": "median_e2e_latency_ms",
    "e2e_p99_ms": "p99_e2e_latency_ms",
}


def bench(server: SGLangServer, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of SGLang's bench client; the figures that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        words = ["--num-prompts", str(arguments.prompts), "--request-rate", str(arguments.rate), "--seed", str(seed)]
        lengths = ["--random-input-len", str(arguments.input), "--random-output-len", str(arguments.output)]
        command = [str(KIT / "bench-sglang"), server.url, *words, *lengths, "--output-file", str(rows)]
        subprocess.run(command, check=True, capture_output=True, timeout=900)
        found: dict[str, Any] = json.loads(rows.read_text().splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rate", default="inf", help="requests per second (default: all at once, as the seed)")
    parser.add_argument("--input", type=int, default=512, help="most prompt tokens")
    parser.add_argument("--output", type=int, default=32, help="most output tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--port", type=int, default=30200)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    ranks = str(arguments.ranks)
    flags = ("--tp", ranks, "--dp", ranks, "--enable-dp-attention")
    with EmbeddedRedis() as redis, tempfile.TemporaryDirectory() as probed:
        ours = SGLangServer(
            arguments.port + 300,  # SGLang takes some ports above its own
            *flags,
            DP_BALANCER_URL=str(redis.url),
            DP_BALANCER_POOL="bench",
            DP_BALANCER_FORM=arguments.form,
            DPB_PROBE_DIR=probed,
            PYTHONPATH=str(PROBE),
            SGLANG_PLUGINS="dp_balancer,dpb_probe",
        )
        with SGLangServer(arguments.port, *flags) as plain, ours:
            rows: dict[str, list[dict[str, Any]]] = {"round_robin": [], "minimum_tokens": []}
            order = [("round_robin", plain), ("minimum_tokens", ours)]
            for number in range(arguments.rounds):
                for name, server in order if number % 2 == 0 else reversed(order):
                    rows[name].append(bench(server, arguments, seed=number))
        print(
            f"{arguments.rounds} rounds of {arguments.prompts} prompts, {ranks} ranks with DP attention, SGLang 0.5.23"
        )
        print("\n" + render({name: _figures(found) for name, found in rows.items()}))
        print("\n" + costs(Path(probed)))
        out = ROOT / "out"
        out.mkdir(exist_ok=True)
        (out / "bench-sglang.json").write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, default=str))
        print(f"\nserver logs: {engines_home() / 'run'}; every figure: out/bench-sglang.json")


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(row[key] for row in rows) for name, key in FIGURES.items()}


if __name__ == "__main__":
    main()
