"""A stream that was played on the stage, in the form of a simulated run, so that both are summarised alike.

Moments are in seconds of the engine, from the first arrival on: of the host's, times the speed. What a step cost is
taken from the engine's price list and not from the clock: it is what the counts say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from balancer.simulator import Run, Scenario, Stream
from balancer.simulator.engine import Progress, StepCost
from balancer.simulator.recorder import Recorder
from balancer.workload import TimedRequest
from scheduler_hooks.demo.stage import Played


def as_run(played: Played, stream: Stream, scenario: Scenario, speed: float) -> Run:
    """The run that `played` shows; `stream` is what was sent, in the order in which the stage numbered it."""
    progress = Progress.of(len(stream))
    for request in played.times.served:
        index = int(request.request_id.rpartition("-")[2])
        progress.rank[index] = request.rank
        progress.dispatched_s[index] = (request.dispatched_s - played.start_s) * speed
        progress.first_token_s[index] = (request.first_token_s - played.start_s) * speed
        progress.finished_s[index] = (request.finished_s - played.start_s) * speed
    recorder = Recorder(scenario, stream)
    for step in played.steps:
        cost = step_cost(step, scenario.profile.base_ms)
        begun_s = (step["t"] - step["duration_s"] - played.start_s) * speed
        recorder.count(begun_s, 0, step["held"], step["requests"], cost)
    return Run(scenario, stream, progress, recorder)


def step_cost(step: Mapping[str, Any], base_ms: float) -> StepCost:
    """What a step cost by the price list, and what it would have with the ranks' own work spread evenly."""
    own_ms = [max(0.0, cost_ms - base_ms) for cost_ms in step["cost_ms"]]
    return StepCost(max(step["cost_ms"]) / 1e3, (base_ms + sum(own_ms) / len(own_ms)) / 1e3)


def as_it_came(played: Played, requests: Sequence[TimedRequest], speed: float) -> list[TimedRequest]:
    """The requests with the moments of the engine at which they were dispatched, in order of these.

    The engine's clock stands still while a step is late: what a machine that is too slow does to the engine is out, and
    what it does to the dispatchers is in.
    """
    came = []
    for served in played.times.served:
        moment_s = served.dispatched_s
        for step in played.steps:  # a step is late from the moment at which it should have ended to its end
            moment_s -= min(step["late_s"], max(0.0, served.dispatched_s - (step["t"] - step["late_s"])))
        request = requests[int(served.request_id.rpartition("-")[2])]
        came.append(replace(request, arrival_s=(moment_s - played.start_s) * speed))
    return sorted(came, key=lambda request: request.arrival_s)


def late_share(played: Played) -> float:
    """The share of the engine's step time that it took only because the machine was too slow."""
    late_s: float = sum(step["late_s"] for step in played.steps)
    duration_s: float = sum(step["duration_s"] for step in played.steps)
    return late_s / duration_s
