"""The replay's arguments and what they make: the streams of its rounds, and the scenario that the simulator plays."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from balancer import InvalidInput
from balancer.simulator import MOCK, EngineKind, Scenario, make_balancer
from balancer.simulator.stream import prefill_rate_per_s, resampled
from balancer.workload import TimedRequest, generate, load_trace, scaled
from scheduler_hooks.mock_engine.scheduler import CHUNK_TOKENS

POLICIES = ("round_robin", "minimum_tokens", "envelope")
REPORT_AGE_S = 0.005
"""How old a report is when a dispatcher reads it: a gather, a thread and a loopback socket on a machine with work."""
_DESCRIPTION = """\
Places the same requests under several policies on a mock engine of real rank processes, which prefills first, through
several dispatcher processes that share one Redis; the policies take turns. Beside what was measured stands what
`balancer simulate` says of the same requests on the same price list. Shares and ratios are computed from the counts
that the engine wrote down, so that a busy machine changes them little; it does change the times.
Redis: --url, else DP_BALANCER_URL, else one started for the time of the replay.
"""
_EXAMPLES = """\
examples:
  balancer replay                                    generated chat, three policies, two rounds
  balancer replay --trace conversation.jsonl.gz --max-input 20000 --policy minimum_tokens --policy pending_envelope
  balancer replay --trace chat.csv.gz --requests 500 --rate 30 --json result.json --html result.html
"""


def parser() -> argparse.ArgumentParser:
    """The replay's arguments."""
    made = argparse.ArgumentParser(
        prog="balancer replay",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--url", metavar="URL", help="a Redis to use, in a pool of the replay's own")
    add("--trace", metavar="FILE", help="CSV (arrival_s,input_len,output_len) or JSONL (timestamp,input_length,"
        "output_length), plain or gzip, of which each round takes other pieces (default: generated chat)")  # fmt: skip
    add("--requests", type=int, default=200, metavar="N", help="requests of a round (default %(default)s)")
    add("--rounds", type=int, default=2, metavar="N", help="rounds, each with a seed of its own (default %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="seed of the first round (default %(default)s)")
    add("--rate", type=float, metavar="R", help="mean arrivals per second, inf for all at once (default: what keeps "
        "the ranks prefilling for --prefill-share of the time)")  # fmt: skip
    add("--prefill-share", type=float, default=0.2, metavar="S", help="(default %(default)s)")
    add("--max-input", type=int, metavar="N", help="cut prompts to N tokens")
    add("--max-output", type=int, default=200, metavar="N", help="cut answers to N tokens (default %(default)s)")
    add("--policy", action="append", metavar="NAME", help=f"may be repeated (default: {', '.join(POLICIES)})")
    add("--ranks", type=int, default=8, metavar="N", help="ranks of the engine (default %(default)s)")
    add("--dispatchers", type=int, default=2, metavar="N", help="dispatcher processes (default %(default)s)")
    add("--form", choices=("gather", "leader"), default="gather", help="how the engine reports (default %(default)s)")
    add("--speed", type=float, default=1.0, metavar="F", help="play F times as fast; less than 1 where the machine is "
        "too slow for the steps (default 1)")  # fmt: skip
    add("--warm-up", type=float, default=0.1, metavar="S", help="share of the requests, from the first, whose time is "
        "not measured (default %(default)s)")  # fmt: skip
    add("--cool-down", type=float, default=0.1, metavar="S", help="the same from the last (default %(default)s)")
    add("--json", metavar="FILE", help="write all numbers")
    add("--html", metavar="FILE", help="write a page with plots of what was measured")
    return made


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played: the stream of each round, and the scenario that stands for the stage."""

    policies: Sequence[str]
    scenario: Scenario
    seeds: range
    rate_per_s: float
    streams: Sequence[list[TimedRequest]]
    source: str


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Check the arguments. Raises InvalidInput for what cannot be played."""
    for name in ("ranks", "dispatchers", "rounds", "requests"):
        if getattr(arguments, name) < 1:
            raise InvalidInput(f"--{name} must be at least 1")
    if not arguments.speed > 0 or not math.isfinite(arguments.speed):
        raise InvalidInput("--speed must be more than 0")
    policies = tuple(dict.fromkeys(arguments.policy or POLICIES))
    for policy in policies:
        make_balancer(policy)
    scenario = Scenario(
        ranks=arguments.ranks,
        kind=EngineKind.PREFILL_FIRST,
        profile=MOCK,
        dispatchers=arguments.dispatchers,
        report_age_s=REPORT_AGE_S * arguments.speed,
        chunk_tokens=CHUNK_TOKENS,
        warm_up=arguments.warm_up,
        cool_down=arguments.cool_down,
    )
    seeds = range(arguments.seed, arguments.seed + arguments.rounds)
    drawn = [_drawn(arguments, seed) for seed in seeds]
    rate_per_s = arguments.rate
    if rate_per_s is None:
        rate_per_s = prefill_rate_per_s(drawn[0], scenario, arguments.prefill_share)
    streams = [scaled(requests, rate_per_s=rate_per_s) for requests in drawn]
    source = arguments.trace.rpartition("/")[2] if arguments.trace else "generated chat"
    return Plan(policies, scenario, seeds, rate_per_s, streams, source)


def _drawn(arguments: argparse.Namespace, seed: int) -> list[TimedRequest]:
    count = arguments.requests
    if arguments.trace:
        requests = resampled(load_trace(arguments.trace, rate_per_s=1.0), count, seed)
    else:
        requests = generate(count, seed, 1.0)
    return scaled(requests, max_input_tokens=arguments.max_input, max_output_tokens=arguments.max_output)
