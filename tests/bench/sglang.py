"""`make bench-sglang`: the seed's table on a real SGLang, 100 prompts, round robin beside minimum tokens.

Two servers of the same SGLang, one plain (its own round robin), one with dp-balancer in it, whose pool is told one
policy after the other. SGLang's own bench client speaks to both in turn, in alternating order, and each figure is the
median of its rounds. A probe takes what dp-balancer costs inside the engine, and the controller's dispatch with it and
without. What it costs in throughput: `tests.bench.sglang_throughput`.

Both servers stay up, but the one that is not asked is frozen (SIGSTOP): SGLang's schedulers and its controller spin
when idle, and one idle server takes the cores from the one that works. About four minutes on two cores; longer prompts
and answers by ARGS="--input 4096 --output 512".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from balancer import Settings
from balancer.admin import PoolAdmin
from balancer.embedded import EmbeddedRedis
from scheduler_hooks.demo.table import render
from tests.engines.sglang.probe import PROBE, costs
from tests.engines.sglang.server import KIT, ROOT, SGLangServer, engines_home, what_is_missing

PLAIN = "round_robin"
POLICIES = ("pending_envelope", "minimum_tokens")
"""Of the pool: the one for engines that prefill and decode in one step, and the seed's."""

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
        said = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if said.returncode or not rows.exists():
            raise SystemExit(f"SGLang's bench client failed:\n{said.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(rows.read_text().splitlines()[-1])
        return found


@contextmanager
def alone(server: SGLangServer) -> Iterator[SGLangServer]:
    """The server awake, and warm, for the length of a run; frozen before and after."""
    server.thaw()
    try:
        server.generate(8, 2)
        yield server
    finally:
        server.freeze()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rate", default="inf", help="requests per second (default: all at once, as the seed)")
    parser.add_argument("--input", type=int, default=1024, help="most prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="most output tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--port", type=int, default=30200)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    ranks = str(arguments.ranks)
    flags = ("--tp", ranks, "--dp", ranks, "--enable-dp-attention")
    with EmbeddedRedis() as redis, tempfile.TemporaryDirectory() as probed, tempfile.TemporaryDirectory() as bare:
        probe = {"PYTHONPATH": str(PROBE)}
        plain = SGLangServer(arguments.port, *flags, SGLANG_PLUGINS="dpb_probe", DPB_PROBE_DIR=bare, **probe)
        ours = SGLangServer(
            arguments.port + 300,  # SGLang takes some ports above its own
            *flags,
            DP_BALANCER_URL=str(redis.url),
            DP_BALANCER_POOL="bench",
            DP_BALANCER_FORM=arguments.form,
            DP_BALANCER_BUDGET_MS="5",  # the plugin's own; the tests give more
            DPB_PROBE_DIR=probed,
            SGLANG_PLUGINS="dp_balancer,dpb_probe",
            **probe,
        )
        say("starting plain SGLang")
        with plain:
            plain.freeze()
            say("starting SGLang with dp-balancer")
            with ours:
                ours.freeze()
                rows = measure(arguments, plain, ours, PoolAdmin(Settings(url=str(redis.url), pool="bench")))
        print(
            f"\n{arguments.rounds} rounds of {arguments.prompts} prompts (up to {arguments.input} + {arguments.output} "
            f"tokens, rate {arguments.rate}), {ranks} ranks with DP attention, SGLang 0.5.23"
        )
        print("\n" + render({name: _figures(found) for name, found in rows.items()}))
        print(f"\nwith dp-balancer\n{costs(Path(probed))}\n\nplain\n{costs(Path(bare))}")
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    (out / "bench-sglang.json").write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, default=str))
    print(f"\nserver logs: {engines_home() / 'run'}; every figure: out/bench-sglang.json")


def measure(
    arguments: argparse.Namespace, plain: SGLangServer, ours: SGLangServer, pool: PoolAdmin
) -> dict[str, list[dict[str, Any]]]:
    """The bench client's rows by method."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (PLAIN, *POLICIES)}
    for number in range(arguments.rounds):
        for name in turns(rows, number):
            if name != PLAIN:
                pool.configure(policy=name)
            with alone(plain if name == PLAIN else ours) as server:
                rows[name].append(bench(server, arguments, seed=number))
            say(f"round {number + 1} of {arguments.rounds}, {name}: {rows[name][-1]['duration']:.1f} s")
    return rows


def turns(names: Iterable[str], number: int) -> list[str]:
    """The names, in reversed order every second time."""
    return list(names)[:: 1 if number % 2 == 0 else -1]


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(row[key] for row in rows) for name, key in FIGURES.items()}


if __name__ == "__main__":
    main()
