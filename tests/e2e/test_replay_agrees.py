"""What the simulator says of policies is what happens with real ranks, hooks, dispatchers and Redis.

Compared are shares and ratios computed from the counts that the engine wrote down, by its price list and not by the
clock. The simulator gets the requests at the moments of the engine's clock at which they came: a machine that is too
slow for the steps, or for the dispatchers, is out of the comparison. A few ms still decide many a close choice and with
it all later ones, so the simulator plays the stream several times with requests that much later, and gives a range.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from balancer.simulator import Run, Stream, Summary, make_balancer, simulate, summary
from balancer.simulator.stream import prefill_rate_per_s
from balancer.workload import TimedRequest, generate, scaled
from scheduler_hooks.demo.stage import Stage
from scheduler_hooks.replay.options import parser, plan_of
from scheduler_hooks.replay.run import Outcome, play

POLICIES = ("round_robin", "minimum_tokens", "envelope")
RATIOS = ("kv_max_mean", "requests_max_mean")
PLAYED_AGAIN, LATE_BY_S = 12, 0.020
SPARE, SPARE_WASTE = 0.08, 0.04
SPEED = 2.0

Range = tuple[float, float]


@pytest.fixture(scope="module")
def played() -> Iterator[tuple[Outcome, list[TimedRequest]]]:
    """Sixty-four prompts, one in four with a document, at a rate that keeps four ranks busy with prefill."""
    words = f"--ranks 4 --requests 64 --rounds 1 --warm-up 0 --cool-down 0 --max-output 100 --speed {SPEED}".split()
    plan = plan_of(parser().parse_args([*words, *(word for name in POLICIES for word in ("--policy", name))]))
    requests = scaled(generate(64, 2, 1.0, document_share=0.25), max_output_tokens=100)
    requests = scaled(requests, rate_per_s=prefill_rate_per_s(requests, plan.scenario, 0.4))
    with Stage("replay", ranks=4, dispatchers=2, url=None, form="gather", speed=SPEED) as stage:
        yield play(replace(plan, streams=[requests]), stage, SPEED), requests


def others(policy: str, run: Run) -> list[Summary]:
    """The requests as they came, again and again, each up to LATE_BY_S later."""
    results = []
    columns = (run.stream.arrival_s, run.stream.input_tokens, run.stream.output_tokens)
    for seed in range(PLAYED_AGAIN):
        source = random.Random(f"{policy}/{seed}")
        moved = [
            TimedRequest(arrival_s + source.uniform(0, LATE_BY_S), prompt, answer)
            for arrival_s, prompt, answer in zip(*columns, strict=True)
        ]
        stream = Stream.of(sorted(moved, key=lambda request: request.arrival_s))
        results.append(summary(simulate(stream, run.scenario, make_balancer(policy))))
    return results


def test_the_simulator_and_a_live_run_agree_in_order_and_size(
    played: tuple[Outcome, list[TimedRequest]],
) -> None:
    # Given the same requests live under three policies, and the range that the simulator gives for each
    outcome, _ = played
    simulated = {policy: others(policy, outcome.seen[policy]) for policy in POLICIES}
    seen = {policy: summary(outcome.seen[policy]) for policy in POLICIES}

    def range_of(policy: str, metric: str) -> Range:
        values = [getattr(one, metric) for one in simulated[policy]]
        return min(values), max(values)

    told_apart, wrong = [], []
    for metric in (*RATIOS, "barrier_waste"):
        live = {policy: getattr(seen[policy], metric) for policy in POLICIES}
        # Then each live value lies where the simulator has it
        for policy in POLICIES:
            low, high = range_of(policy, metric)
            spare = SPARE_WASTE if metric == "barrier_waste" else SPARE * low
            if not low - spare <= live[policy] <= high + spare:
                wrong.append(f"{policy}: {metric} {live[policy]:.3f} live, {low:.3f} to {high:.3f} simulated")
        # And two policies that the simulator tells apart are in the same order live
        for one, other in combinations(POLICIES, 2):
            lesser, greater = (one, other) if range_of(one, metric) < range_of(other, metric) else (other, one)
            if range_of(lesser, metric)[1] < range_of(greater, metric)[0]:
                told_apart.append((metric, lesser, greater))
                if live[lesser] >= live[greater]:
                    wrong.append(f"{metric}: {lesser} {live[lesser]:.3f}, {greater} {live[greater]:.3f} live")
    assert not wrong, wrong
    # And there was something to tell: who is even in tokens, who in requests
    assert ("kv_max_mean", "minimum_tokens", "round_robin") in told_apart
    assert len(told_apart) >= 3


def test_every_request_was_served_on_the_rank_that_was_chosen(
    played: tuple[Outcome, list[TimedRequest]],
) -> None:
    outcome, requests = played
    for run in outcome.live.runs.values():
        progress = run.progress
        assert set(progress.rank) == set(range(4))
        for index, request in enumerate(requests):
            assert request.arrival_s <= progress.dispatched_s[index] < progress.first_token_s[index]
            assert progress.first_token_s[index] <= progress.finished_s[index]
