"""The main job: one mock engine, several dispatcher replicas, the same requests once per policy, one table.

Everything is a process of its own, as in production (`stage`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import orjson

from balancer import InvalidInput
from balancer.workload import TimedRequest, generate, load_trace, scaled
from scheduler_hooks.demo.measure import Times, figures
from scheduler_hooks.demo.stage import Stage
from scheduler_hooks.demo.table import render

POLICIES = ("round_robin", "minimum_tokens")
DOCUMENT_SHARE = 0.1
"""One prompt in ten carries a document, the others are chat: uneven, as traffic is."""

QUICK_OUTPUT = 40

_DESCRIPTION = """\
Places one stream of requests on a mock engine of real rank processes, once per policy, through several dispatcher
processes that share one Redis, and shows how long the requests took. The engine computes nothing: a step sleeps as
long as its slowest rank would take. Redis: --url, else DP_BALANCER_URL, else one started for the time of the demo.
"""

_EXAMPLES = """\
examples:
  balancer demo                                      100 prompts at once, three times over; about 75 s
  balancer demo --rounds 1 --requests 400 --rate 14  a steady stream
  balancer demo --rounds 1 --requests 300 --rate 8 --trace conversation.jsonl.gz
                                                     lengths and arrival pattern of a real trace
"""


def parser() -> argparse.ArgumentParser:
    """The demo's arguments."""
    made = argparse.ArgumentParser(
        prog="balancer demo",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--url", metavar="URL", help="a Redis to use, in a pool of the demo's own")
    add("--ranks", type=int, default=16, metavar="N", help="ranks of the engine (default 16)")
    add("--dispatchers", type=int, default=3, metavar="N", help="dispatcher processes (default 3)")
    add("--requests", type=int, metavar="N", default=100, help="requests of a round (default 100)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds, each with a seed of its own (default 3)")
    add(
        "--rate",
        type=float,
        metavar="R",
        help="mean arrivals per second, inf for all at once (default inf, or the trace's own)",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the first round (default 1)")
    add("--trace", metavar="FILE", help="CSV (arrival_s,input_len,output_len) or JSONL (timestamp,input_length,"
        "output_length), plain or gzip, instead of the built-in lengths")  # fmt: skip
    add("--max-input", type=int, metavar="N", help="cut prompts to N tokens")
    add("--max-output", type=int, metavar="N", help="cut answers to N tokens (default 400)", default=400)
    add("--policy", action="append", metavar="NAME", help="policy to run, may be repeated (default: round_robin and "
        "minimum_tokens)")  # fmt: skip
    add("--form", choices=("gather", "leader"), default="gather", help="how the engine reports (default gather)")
    add("--json", metavar="FILE", help="also write the figures as JSON")
    add("--quick", action="store_true", help="a short run: shows that it works, not what it is worth")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the process's exit code."""
    streams = _streams(arguments)
    policies = tuple(arguments.policy or POLICIES)
    stage = Stage(
        "demo",
        ranks=arguments.ranks,
        dispatchers=arguments.dispatchers,
        url=arguments.url,
        form=arguments.form,
    )
    with stage:
        tokens = sum(request.input_tokens for requests in streams for request in requests)
        count, rounds = len(streams[0]), len(streams)
        print(f"requests   {rounds} x {count}, {tokens:,} prompt tokens, {arguments.dispatchers} dispatchers\n")
        seen: dict[str, list[Times]] = {policy: [] for policy in policies}
        steps: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
        for number, requests in enumerate(streams):
            for policy in policies:
                played = stage.play(policy, number, requests)
                seen[policy].append(played.times)
                steps[policy] += played.steps
        results = {policy: figures(seen[policy], steps[policy]) for policy in policies}
        print(render(results))
    if arguments.json:
        Path(arguments.json).write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    return 0


def _streams(arguments: argparse.Namespace) -> list[list[TimedRequest]]:
    """The stream of each round."""
    if arguments.rate is not None and not arguments.rate > 0:
        raise InvalidInput("--rate must be more than 0, or inf")
    for name in ("ranks", "dispatchers", "rounds", "requests"):
        if getattr(arguments, name) < 1:
            raise InvalidInput(f"--{name} must be at least 1")
    rounds = 1 if arguments.quick else arguments.rounds
    return [_requests(arguments, arguments.seed + number) for number in range(rounds)]


def _requests(arguments: argparse.Namespace, seed: int) -> list[TimedRequest]:
    count, rate = arguments.requests, arguments.rate
    if arguments.trace is None:
        requests = generate(count, seed, rate or math.inf, document_share=DOCUMENT_SHARE)
        rate = None
    else:
        requests = load_trace(arguments.trace, rate_per_s=rate or math.inf, seed=seed)
    return scaled(
        requests,
        count=count,
        rate_per_s=rate,
        max_input_tokens=arguments.max_input,
        max_output_tokens=QUICK_OUTPUT if arguments.quick else arguments.max_output,
    )
