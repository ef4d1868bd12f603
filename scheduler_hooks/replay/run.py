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
from scheduler_hooks.replay.live import as_it_came, as_run, late_share
from scheduler_hooks.replay.options import Plan, plan_of
from scheduler_hooks.replay.table import render


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both sides, the largest share of a run's step time for which the machine was too slow, and the requests of the
    first round as each policy's engine saw them come (`live.as_it_came`)."""

    live: Comparison
    simulated: Comparison
    late: float
    came: dict[str, list[TimedRequest]]


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
    came: dict[str, list[TimedRequest]] = {}
    late = 0.0
    for number, (seed, requests) in enumerate(zip(plan.seeds, plan.streams, strict=True)):
        first = number % len(plan.policies)
        for policy in (*plan.policies[first:], *plan.policies[:first]):
            played = stage.play(policy, number, _at_speed(requests, speed))
            live = as_run(played, streams[seed], plan.scenario, speed)
            summaries[policy].append(summary(live))
            runs.setdefault(policy, live)
            if number == 0:
                came[policy] = as_it_came(played, requests, speed)
            late = max(late, late_share(played))
    live_runs = Comparison(plan.scenario, plan.seeds, summaries, runs)
    simulated = compare(plan.policies, plan.scenario, streams.__getitem__, plan.seeds)
    return Outcome(live_runs, simulated, late, came)


def _at_speed(requests: list[TimedRequest], speed: float) -> list[TimedRequest]:
    return [replace(request, arrival_s=request.arrival_s / speed) for request in requests]


def _save(path: str, content: bytes) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
