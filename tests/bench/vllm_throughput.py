"""What the plugin costs a whole vLLM: two servers that differ in nothing but the plugin, under the same load in turn.

    python -m tests.bench.vllm_throughput [--pairs 8] [--prompts 300]

Closed loop of 64 clients (`vllm-rs bench serve`), two ranks each, hook and inside dispatcher on one side. Writes
out/vllm_throughput.json, prints the ratio within pairs with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.bench.vllm_balance import interval
from tests.engines.vllm.kit import PORT, VllmServer, redis_on


def output_tokens_per_s(server: VllmServer, prompts: int) -> float:
    """One closed-loop run."""
    result = server.bench("--num-prompts", str(prompts), "--request-rate", "inf", "--max-concurrency", "64")
    assert result["completed"] == prompts, result
    return float(result["output_throughput"])


def main() -> None:
    """Run the pairs, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/vllm_throughput.json"))
    options = parser.parse_args()
    with redis_on(PORT + 402) as url:
        off = {"DP_BALANCER_URL": ""}
        with_plugin = VllmServer("with-plugin", url, PORT + 40, 2, 1, audited=False)
        without = VllmServer("without-plugin", url, PORT + 50, 2, 1, audited=False, environment=off)
        pairs: list[tuple[float, float]] = []
        try:
            for server in (with_plugin, without):
                server.start()
                output_tokens_per_s(server, 64)
            for number in range(options.pairs):
                sides = (with_plugin, without) if number % 2 else (without, with_plugin)
                found = {server.name: output_tokens_per_s(server, options.prompts) for server in sides}
                pairs.append((found["with-plugin"], found["without-plugin"]))
                print(f"with {pairs[-1][0]:,.0f}, without {pairs[-1][1]:,.0f} output tokens/s", flush=True)
        finally:
            with_plugin.stop()
            without.stop()
    change = interval([100 * (ours / theirs - 1) for ours, theirs in pairs])
    print(f"change by the plugin: {change[0]:+.1f} % ({change[1]:+.1f} to {change[2]:+.1f}), {len(pairs)} pairs")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"pairs": pairs, "change_percent": change}, indent=2) + "\n")


if __name__ == "__main__":
    main()
