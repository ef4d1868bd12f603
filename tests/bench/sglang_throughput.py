"""What the plugin costs a whole SGLang: servers that differ in nothing but the plugin, under the same load in turn.

    python -m tests.bench.sglang_throughput [--starts 6] [--pairs 3]

Two servers alike differ too, by where their memory came to lie and how their ranks fell into step. So the unit is a
start: both servers are started anew, in alternating order, take `pairs` turns at a closed loop of equal requests, both
by round robin, and give one ratio; the interval is over starts. With `--control` the second server is a plain one too,
and the ratio says what this machine finds between two alike.

The server that is not asked is frozen, as in `make bench-sglang`. Writes out/sglang_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

from balancer import Settings
from balancer.admin import PoolAdmin
from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import interval
from tests.bench.sglang import alone, say, turns
from tests.engines.sglang.server import ROOT, SGLangServer, what_is_missing

FLAGS = ("--tp", "2", "--dp", "2", "--enable-dp-attention")


def closed_loop(server: SGLangServer, requests: int = 96, at_once: int = 16) -> float:
    """Output tokens per second of equal requests, `at_once` of them at a time."""
    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda _: server.generate(64, 32), range(requests)))
    tokens = sum(int(answer["meta_info"]["completion_tokens"]) for answer in answers)
    return tokens / (time.monotonic() - began)


def one_start(servers: dict[str, SGLangServer], pairs: int) -> dict[str, list[float]]:
    """Both servers up, `pairs` turns each, both down; output tokens per second of each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    started: list[SGLangServer] = []
    try:
        for server in servers.values():
            started.append(server)
            server.start().freeze()
        for number in range(pairs):
            for name in turns(servers, number):
                with alone(servers[name]) as server:
                    speeds[name].append(closed_loop(server))
    finally:
        for server in started:
            server.stop()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=3, help="turns of each server in one start")
    parser.add_argument("--control", action="store_true", help="a plain server in the place of the one with the plugin")
    parser.add_argument("--port", type=int, default=30200)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    with EmbeddedRedis() as redis:
        PoolAdmin(Settings(url=str(redis.url), pool="bench")).configure(policy="round_robin")
        plugin = {"DP_BALANCER_URL": str(redis.url), "DP_BALANCER_POOL": "bench", "DP_BALANCER_BUDGET_MS": "5"}
        environment = {"plain": {}, "plain again": {}} if arguments.control else {"plain": {}, "dp-balancer": plugin}
        ports = {name: arguments.port + 300 * place for place, name in enumerate(environment)}
        starts = []
        for number in range(arguments.starts):
            order = turns(environment, number)
            servers = {name: SGLangServer(ports[name], *FLAGS, **environment[name]) for name in order}
            starts.append(one_start(servers, arguments.pairs))
            say(f"start {number + 1}: " + "; ".join(f"{n} {[round(v) for v in s]}" for n, s in starts[-1].items()))
    plain, other = environment
    changes = [100 * (sum(start[other]) / sum(start[plain]) - 1) for start in starts]
    low, mean, high = interval(changes)
    print(f"output tokens per second, {other} against {plain}, {len(starts)} starts: {mean:+.1f} % "
          f"(95 %: {low:+.1f} to {high:+.1f}), each {[round(change, 1) for change in changes]}")  # fmt: skip
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    found = {"arguments": vars(arguments), "starts": starts, "change_percent": [low, mean, high]}
    (out / "sglang_throughput.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
