"""What the plugin costs a whole vLLM: two servers that differ in nothing but the plugin, under the same load in turn.

    python -m tests.bench.vllm_throughput [--pairs 8] [--prompts 500] [--rate 15]

Two ranks each, hook and inside dispatcher on one side. A turn is `vllm-rs bench serve` twice: open loop at a rate below
saturation, for latencies and for the CPU time that all processes of the server spend on a request, and a closed loop of
64 clients, for throughput. The other server idles meanwhile; what that costs is measured first. Writes
out/vllm_throughput.json, prints the change within pairs with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from tests.bench.vllm_balance import table
from tests.engines.vllm.kit import PORT, VllmServer, redis_on

IDLE_S = 5.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(server: VllmServer) -> float:
    """CPU time that the server's processes have used so far, those that have ended included."""
    session, used = server.session(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()  # state ppid pgrp session ...
        except OSError:
            continue  # it has just ended
        if int(words[3]) == session:
            used += sum(map(int, words[11:15]))
    return used * _TICK_S


def one_turn(server: VllmServer, prompts: int, rate: float) -> dict[str, float]:
    """One side's turn; its numbers."""
    open_prompts = round(rate * 10)
    before = cpu_s(server)
    below = server.bench("--num-prompts", str(open_prompts), "--request-rate", str(rate))
    between = cpu_s(server)
    full = server.bench("--num-prompts", str(prompts), "--request-rate", "inf", "--max-concurrency", "64")
    after = cpu_s(server)
    assert (below["completed"], full["completed"]) == (open_prompts, prompts), (below, full)
    return {
        "cpu_ms_per_request": 1e3 * (between - before) / open_prompts,
        "ttft_mean_ms": below["mean_ttft_ms"],
        "tpot_mean_ms": below["mean_tpot_ms"],
        "full_cpu_ms_per_request": 1e3 * (after - between) / prompts,
        "full_output_tokens_per_s": full["output_throughput"],
    }


def idle_share(server: VllmServer) -> float:
    """Share of a core that the server takes when nobody asks it anything."""
    before = cpu_s(server)
    time.sleep(IDLE_S)
    return (cpu_s(server) - before) / IDLE_S


def main() -> None:
    """Run the pairs, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=500, help="of a closed loop")
    parser.add_argument("--rate", type=float, default=15, help="requests per second of an open loop")
    parser.add_argument("--out", type=Path, default=Path("out/vllm_throughput.json"))
    options = parser.parse_args()
    with redis_on(PORT + 402) as url:
        off = {"DP_BALANCER_URL": ""}
        with_plugin = VllmServer("with-plugin", url, PORT + 40, 2, 1, audited=False)
        without = VllmServer("without-plugin", url, PORT + 50, 2, 1, audited=False, environment=off)
        pairs: list[dict[str, dict[str, float]]] = []
        try:
            for server in (with_plugin, without):
                server.start()
                one_turn(server, 64, options.rate)
            idle = {server.name: round(idle_share(server), 4) for server in (with_plugin, without)}
            print(f"idle, of a core: {idle}", flush=True)
            for number in range(options.pairs):
                sides = (with_plugin, without) if number % 2 else (without, with_plugin)
                pairs.append({server.name: one_turn(server, options.prompts, options.rate) for server in sides})
                print(json.dumps(pairs[-1]), flush=True)
        finally:
            with_plugin.stop()
            without.stop()
    changes = table(pairs, without.name, with_plugin.name)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"idle": idle, "pairs": pairs, "change_percent": changes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
