"""The command: arguments in, table out. `balancer simulate` and `python -m balancer.simulator` are both this."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Protocol

from balancer.errors import InvalidInput
from balancer.simulator.experiment import Comparison, Objective, balancer_names, capacity_per_s, compare, make_balancer
from balancer.simulator.profiles import PROFILES
from balancer.simulator.progress import ProgressBar
from balancer.simulator.report import document, finite, text
from balancer.simulator.report_html import page
from balancer.simulator.scenario import EngineKind, Scenario
from balancer.simulator.stream import Stream, decode_rate_per_s, prefill_rate_per_s, requests_per_rank, resampled
from balancer.workload import TimedRequest, generate, load_trace, scaled

DETAILS = """\
Simulate engines whose ranks step together, place a stream of requests on them with
several balancers, and compare. No GPU, no Redis. Balancers are the project's policies
(in Python, fast; with lua: before the name the shipped script itself, which needs the
extra `simulator`) and what engines do today: sglang_total_tokens, vllm, seed.

The stream is a trace (CSV arrival_s,input_len,output_len or JSONL; see `balancer demo`),
resampled in blocks by each seed, or generated chat. Its rate is the one given, or what
puts --per-rank requests on each rank of a decode engine, or what keeps a unified engine's
ranks prefilling for --prefill-share of the time; bursts and lulls are kept."""
EXAMPLES = (
    "balancer simulate",
    "balancer simulate --trace trace.csv.gz --profile h20 --ranks 64 --html report.html",
    "balancer simulate --balancers minimum_tokens,envelope,lua:minimum_tokens --seeds 5",
    "balancer simulate --kind prefill_first --dispatchers 16 --private --report-age-ms 100",
    "balancer simulate --slo-tpot-p99-ms 50 --json result.json",
)
_BALANCERS = "round_robin,minimum_requests,minimum_tokens,envelope,sglang_total_tokens,vllm,seed"
_KV_SHARE = 0.6
"""Of the KV pool, at most this much is used where the command chooses the rate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options."""
    add = parser.add_argument
    add("--trace", metavar="FILE", help="requests of a real service (default: generated chat)")
    add("--requests", type=int, default=8_000, metavar="N", help="requests in each run (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each balancer (default: %(default)s)")
    add("--rate", type=float, metavar="R", help="requests per second; inf lets all arrive at once")
    add("--per-rank", type=float, default=128, metavar="N", help="decode: requests on each rank (default: 128)")
    add("--prefill-share", type=float, default=0.3, metavar="S", help="unified: time spent on prefill (default: 0.3)")
    add("--balancers", default=_BALANCERS, metavar="NAMES", help="comma-separated (default: %(default)s)")
    add("--kind", choices=[kind.value for kind in EngineKind], default="decode", help="(default: %(default)s)")
    add("--profile", choices=list(PROFILES), default="h200", help="hardware (default: %(default)s)")
    add("--ranks", type=int, default=16, metavar="N", help="ranks of each engine (default: %(default)s)")
    add("--engines", type=int, default=1, metavar="N", help="(default: %(default)s)")
    add("--dispatchers", type=int, default=1, metavar="N", help="1 to 32 (default: %(default)s)")
    add("--private", action="store_true", help="each dispatcher sees its own bookings only")
    add("--report-age-ms", type=float, default=0, metavar="MS", help="age of reports when read (default: 0)")
    add("--ack-age-ms", type=float, default=0, metavar="MS", help="the same for received ids, if older")
    add("--report-every", type=int, default=1, metavar="N", help="steps from report to report (default: 1)")
    add("--send-ms", type=float, default=0, metavar="MS", help="way from dispatcher to rank (default: 0)")
    add("--list-size", type=int, default=1, metavar="N", help="most requests placed as one list (default: 1)")
    add("--warm-up", type=float, default=0.25, metavar="S", help="share not measured at the begin (default: 0.25)")
    add("--cool-down", type=float, default=0.1, metavar="S", help="share not measured at the end (default: 0.1)")
    add("--slo-ttft-p99-ms", type=float, metavar="MS", help="also find the highest rate that keeps this (10 s if not "
        "given beside the next)")  # fmt: skip
    add("--slo-tpot-p99-ms", type=float, metavar="MS", help="also find the highest rate that keeps this")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--html", type=Path, metavar="FILE", help="write a page with plots")


def run(arguments: argparse.Namespace) -> int:
    """Simulate, print the table, write what was asked for; returns 0."""
    scenario = _scenario(arguments)
    names = [name.strip() for name in arguments.balancers.split(",") if name.strip()]
    if not names:
        raise InvalidInput(f"no balancer given: there are {', '.join(balancer_names())}")
    for name in names:
        make_balancer(name)
    if arguments.seeds < 1:
        raise InvalidInput(f"seeds must be at least 1, not {arguments.seeds}")
    requests = _requests(arguments)
    rate_per_s = arguments.rate or _rate_per_s(requests, scenario, arguments)
    stream_at = _streams(requests, arguments)
    bar = ProgressBar("simulating")
    try:
        comparison = compare(
            names, scenario, lambda seed: stream_at(seed, rate_per_s), range(arguments.seeds), bar.tell
        )
    finally:
        bar.end()
    capacities = _capacities(names, scenario, stream_at, rate_per_s, arguments)
    source = Path(arguments.trace).name if arguments.trace else "generated chat"
    print(f"{source}, {rate_per_s:.4g} requests/s")
    print(text(comparison, capacities), flush=True)
    _write(arguments, comparison, capacities, source, rate_per_s)
    return 0


def _scenario(arguments: argparse.Namespace) -> Scenario:
    return Scenario(
        ranks=arguments.ranks,
        engines=arguments.engines,
        kind=EngineKind(arguments.kind),
        profile=PROFILES[arguments.profile],
        dispatchers=arguments.dispatchers,
        shared=not arguments.private,
        report_age_s=arguments.report_age_ms / 1e3,
        acknowledgement_age_s=arguments.ack_age_ms / 1e3,
        report_every=arguments.report_every,
        send_s=arguments.send_ms / 1e3,
        list_size=arguments.list_size,
        warm_up=arguments.warm_up,
        cool_down=arguments.cool_down,
    )


def _requests(arguments: argparse.Namespace) -> list[TimedRequest]:
    """What seeds draw from. A trace without arrivals gets random ones, which the rate then stretches."""
    if arguments.requests < 1:
        raise InvalidInput(f"requests must be at least 1, not {arguments.requests}")
    if arguments.trace:
        return load_trace(arguments.trace, rate_per_s=1.0)
    return generate(arguments.requests, 0, 1.0)


class _StreamAt(Protocol):
    """The stream of a seed at a rate, of --requests requests unless told otherwise."""

    def __call__(self, seed: int, rate_per_s: float, count: int = ...) -> Stream: ...


def _streams(requests: list[TimedRequest], arguments: argparse.Namespace) -> _StreamAt:
    def stream_at(seed: int, rate_per_s: float, count: int = arguments.requests) -> Stream:
        drawn = resampled(requests, count, seed) if arguments.trace else generate(count, seed, 1.0)
        return Stream.of(scaled(drawn, rate_per_s=rate_per_s))

    return stream_at


def _rate_per_s(requests: list[TimedRequest], scenario: Scenario, arguments: argparse.Namespace) -> float:
    if scenario.kind is EngineKind.DECODE:
        per_rank = requests_per_rank(requests, scenario, arguments.per_rank, _KV_SHARE)
        return decode_rate_per_s(requests, scenario, per_rank)
    return prefill_rate_per_s(requests, scenario, arguments.prefill_share)


def _capacities(
    names: list[str],
    scenario: Scenario,
    stream_at: _StreamAt,
    rate_per_s: float,
    arguments: argparse.Namespace,
) -> dict[str, float] | None:
    objective = Objective(arguments.slo_ttft_p99_ms, arguments.slo_tpot_p99_ms)
    if objective == Objective() or math.isinf(rate_per_s):
        return None

    def as_long(rate: float) -> Stream:
        """As long as the runs above, and so with more requests where there are more a second."""
        return stream_at(0, rate, math.ceil(arguments.requests * max(1.0, rate / rate_per_s)))

    bar, found = ProgressBar("searching capacities", "balancers"), dict[str, float]()
    try:
        for number, name in enumerate(names):
            bar.tell(number, len(names))
            found[name] = capacity_per_s(name, scenario, as_long, objective, rate_per_s)
    finally:
        bar.end()
    return found


def _write(
    arguments: argparse.Namespace,
    comparison: Comparison,
    capacities: dict[str, float] | None,
    source: str,
    rate_per_s: float,
) -> None:
    if arguments.json:
        written = {"source": source, "rate_per_s": finite(rate_per_s), **document(comparison, capacities)}
        _save(arguments.json, json.dumps(written, indent=2) + "\n")
    if arguments.html:
        _save(arguments.html, page(comparison, f"{source}, {rate_per_s:.4g} requests/s", capacities))


def _save(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
