"""Where short requests go while one rank prefills a long prompt: SGLang's `total_tokens` beside dp-balancer.

    python -m tests.bench.sglang_long_prompt

One server with one controller at a time, no dispatcher outside. SGLang counts of a prompt only the chunks that are
prefilled, 256 at a time, so to its controller the rank with 6,000 tokens looks like the emptier one. Each round: a long
prompt, and as soon as a rank has it, a burst of short ones. How many of them went to the same rank, and how long they
took. (Short ones that come slower than the chunks are done stay away from it under both.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from balancer.embedded import EmbeddedRedis
from tests.bench.sglang import say
from tests.engines.sglang.server import ROOT, SGLangServer, what_is_missing


def one_round(server: SGLangServer, arguments: argparse.Namespace) -> dict[str, float]:
    """How many of the short ones followed the long prompt, the mean and the longest of their times, the long one's."""

    def timed(tokens: int) -> tuple[int, float]:
        began = time.monotonic()
        answer: Any = server.generate(tokens, 4)
        return int(answer["meta_info"]["dp_rank"]), time.monotonic() - began

    with ThreadPoolExecutor(arguments.short + 1) as pool:
        long = pool.submit(timed, arguments.long)
        while not any(server.counted().values()):
            time.sleep(0.005)
        short = []
        for _ in range(arguments.short):
            assert not long.done(), "the long prompt was over before the short ones were sent: make it longer"
            short.append(pool.submit(timed, arguments.tokens))
            time.sleep(arguments.every_ms / 1000)
        rank, long_s = long.result()
        answers = [one.result() for one in short]
    return {
        "followed": sum(one == rank for one, _ in answers),
        "short_s": statistics.mean(seconds for _, seconds in answers),
        "slowest_s": max(seconds for _, seconds in answers),
        "long_s": long_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=6_000, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=20, help="how many short ones")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of a short one")
    parser.add_argument("--every-ms", type=int, default=5, help="time between two short ones")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a rank's chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=30800)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    ranks = str(arguments.ranks)
    flags = ["--tp", ranks, "--dp", ranks, "--enable-dp-attention", "--load-balance-method", "total_tokens"]
    flags += ["--chunked-prefill-size", str(arguments.chunk * arguments.ranks)]  # SGLang divides it by the ranks
    found: dict[str, list[dict[str, float]]] = {}
    with EmbeddedRedis() as redis:
        for name, environment in (
            ("total_tokens", {}),
            ("dp-balancer", {"DP_BALANCER_URL": redis.url, "DP_BALANCER_POOL": "long"}),
        ):
            say(f"starting SGLang, {name}")
            with SGLangServer(arguments.port, *flags, **environment) as server:
                server.generate(arguments.tokens, 4)
                found[name] = [one_round(server, arguments) for _ in range(arguments.rounds)]
            followed = [one["followed"] for one in found[name]]
            say(
                f"{name:<13} {statistics.mean(followed):4.1f} of {arguments.short} went after the long prompt "
                f"({min(followed):.0f} to {max(followed):.0f} in {arguments.rounds} rounds); "
                f"a short one took {statistics.mean(one['short_s'] for one in found[name]):.2f} s, "
                f"the slowest {statistics.mean(one['slowest_s'] for one in found[name]):.2f} s, "
                f"the long one {statistics.mean(one['long_s'] for one in found[name]):.2f} s"
            )
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "sglang-long-prompt.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
