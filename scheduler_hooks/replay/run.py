"""Plays every round's stream under every policy, simulates the same, and writes what came of both."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from balancer import InvalidInput
from balancer.simulator import Comparison, Run, Stream, Summary, compare, summary
from balancer.simulator.report import document, finite
from balancer.simulator.report_html import page
from balancer.workload import TimedRequest
from scheduler_hooks.demo.stage import Stage
from scheduler_hooks.replay.live import as_run, as_the_engine_saw_it, late_share
from scheduler_hooks.replay.options import Plan, plan_of
from scheduler_hooks.replay.table import render

MOST_LATE = 0.1
"""More of an engine's time lost to a slow machine, and requests pile up that would not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both sides, the largest share of a run's step time for which the machine was too slow, and the first round's runs
    on the engine's clock (`live.as_the_engine_saw_it`)."""

    live: Comparison
    simulated: Comparison
    late: float
    seen: dict[str, Run]


def run(arguments: argparse.Namespace) -> int:
    """Run the replay; returns the process's exit code."""
    plan = plan_of(arguments)
    stage = Stage(
        "replay",
        ranks=arguments.ranks,
        dispatchers=arguments.dispatchers,
        url=arguments.url,
        form=arguments.form,
        speed=arguments.speed,
    )
    with stage:
        tokens = sum(request.input_tokens for requests in plan.streams for request in requests)
        title = f"{plan.source}, {len(plan.streams)} x {len(plan.streams[0])} requests, {plan.rate_per_s:.4g} a second"
        print(f"requests   {title}, {tokens:,} prompt tokens, {arguments.dispatchers} dispatchers\n", flush=True)
        outcome = play(plan, stage, arguments.speed)
    print(render(outcome.live, outcome.simulated))
    print(f"\nlate       {outcome.late:.1%} of the slowest run's step time: this machine, not the policy")
    if outcome.late > MOST_LATE:
        print(
            "           too much to compare policies by: give --speed 0.5 or less, or fewer --ranks, or a quieter hour"
        )
    if arguments.json:
        written = {
            "source": plan.source,
            "rate_per_s": finite(plan.rate_per_s),
            "late": outcome.late,
            "live": document(outcome.live),
            "simulated": document(outcome.simulated),
        }
        _save(arguments.json, orjson.dumps(written, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if arguments.html:
        _save(arguments.html, page(outcome.live, f"Live on the mock engine: {title}").encode())
    return 0


def play(plan: Plan, stage: Stage, speed: float) -> Outcome:
    """All streams under all policies. Each round begins with another one: what drifts on the machine hits all alike."""
    streams = {seed: Stream.of(requests) for seed, requests in zip(plan.seeds, plan.streams, strict=True)}
    summaries: dict[str, list[Summary]] = {policy: [] for policy in plan.policies}
    runs: dict[str, Run] = {}
    seen: dict[str, Run] = {}
    late = 0.0
    for number, requests in enumerate(plan.streams):
        first = number % len(plan.policies)
        for policy in (*plan.policies[first:], *plan.policies[:first]):
            played = stage.play(policy, number, _at_speed(requests, speed))
            live = as_run(played, requests, plan.scenario, speed)
            summaries[policy].append(summary(live))
            runs.setdefault(policy, live)
            if number == 0:
                seen[policy] = as_the_engine_saw_it(played, requests, plan.scenario, speed)
            late = max(late, late_share(played))
    live_runs = Comparison(plan.scenario, plan.seeds, summaries, runs)
    simulated = compare(plan.policies, plan.scenario, streams.__getitem__, plan.seeds)
    return Outcome(live_runs, simulated, late, seen)


def _at_speed(requests: list[TimedRequest], speed: float) -> list[TimedRequest]:
    return [replace(request, arrival_s=request.arrival_s / speed) for request in requests]


def _save(path: str, content: bytes) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
