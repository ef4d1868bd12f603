"""A stream that was played on the stage, in the form of a simulated run, so that both are summarised alike.

What a step cost is taken from the engine's price list and not from the clock: it is what the counts say. Moments are in
seconds from the first arrival on, of one of two clocks: the stream's own, which is the host's times the speed, or the
engine's, which stands still while a step is late. On the engine's, what a slow machine does to the engine is out, and
requests come when they were really dispatched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from balancer.simulator import Run, Scenario, Stream
from balancer.simulator.engine import Progress, StepCost
from balancer.simulator.recorder import Recorder
from balancer.workload import TimedRequest
from scheduler_hooks.demo.measure import Served
from scheduler_hooks.demo.stage import Played

Clock = Callable[[float], float]
"""From a moment of the host's monotonic clock, in s, to one of a run."""


def as_run(played: Played, requests: Sequence[TimedRequest], scenario: Scenario, speed: float) -> Run:
    """The run that users saw: `requests` as the stage was to send them, times with all that this machine lost."""

    def moment(now_s: float) -> float:
        return (now_s - played.start_s) * speed

    return _run(played, scenario, _served(played, requests), moment)


def as_the_engine_saw_it(played: Played, requests: Sequence[TimedRequest], scenario: Scenario, speed: float) -> Run:
    """The run on the engine's clock; its stream is what a simulator has to be given to live through the same."""
    ends_s: list[float] = [step["t"] for step in played.steps]
    lost_s: list[float] = list(accumulate((step["late_s"] for step in played.steps), initial=0.0))

    def moment(now_s: float) -> float:
        ended = bisect_left(ends_s, now_s)
        late_s = lost_s[ended]
        if ended < len(ends_s):  # a late step's ranks came late to its begin, where they take what has arrived
            step = played.steps[ended]
            late_s += min(step["late_s"], max(0.0, now_s - (step["t"] - step["duration_s"])))
        return (now_s - late_s - played.start_s) * speed

    came = [
        (replace(request, arrival_s=moment(served.dispatched_s)), served)
        for request, served in _served(played, requests)
    ]
    return _run(played, scenario, sorted(came, key=lambda one: one[0].arrival_s), moment)


def _served(played: Played, requests: Sequence[TimedRequest]) -> list[tuple[TimedRequest, Served]]:
    """Each request and what came of it, in the order in which the stage numbered them."""
    by_index = {int(served.request_id.rpartition("-")[2]): served for served in played.times.served}
    return [(request, by_index[index]) for index, request in enumerate(requests)]


def _run(played: Played, scenario: Scenario, requests: Sequence[tuple[TimedRequest, Served]], moment: Clock) -> Run:
    stream, progress = Stream.of([request for request, _ in requests]), Progress.of(len(requests))
    for index, (_, served) in enumerate(requests):
        progress.rank[index] = served.rank
        progress.dispatched_s[index] = moment(served.dispatched_s)
        progress.first_token_s[index] = moment(served.first_token_s)
        progress.finished_s[index] = moment(served.finished_s)
    recorder = Recorder(scenario, stream)
    for step in played.steps:
        cost = step_cost(step, scenario.profile.base_ms)
        recorder.count(moment(step["t"] - step["duration_s"]), 0, step["held"], step["requests"], cost)
    return Run(scenario, stream, progress, recorder)


def step_cost(step: Mapping[str, Any], base_ms: float) -> StepCost:
    """What a step cost by the price list, and what it would have with the ranks' own work spread evenly."""
    own_ms = [max(0.0, cost_ms - base_ms) for cost_ms in step["cost_ms"]]
    return StepCost(max(step["cost_ms"]) / 1e3, (base_ms + sum(own_ms) / len(own_ms)) / 1e3)


def late_share(played: Played) -> float:
    """The share of the engine's step time that it took only because the machine was too slow."""
    late_s: float = sum(step["late_s"] for step in played.steps)
    duration_s: float = sum(step["duration_s"] for step in played.steps)
    return late_s / duration_s
