"""Balancers side by side: the same streams for each, means over seeds with their intervals, capacity at an SLO."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from balancer.errors import InvalidInput
from balancer.scripts import policy_names
from balancer.simulator.balancing import MakeBalancer
from balancer.simulator.baselines import BASELINES
from balancer.simulator.lua_pool import lua
from balancer.simulator.metrics import Summary, summary
from balancer.simulator.policies import TWINS
from balancer.simulator.pool import twin
from balancer.simulator.scenario import Scenario
from balancer.simulator.simulation import Run, Told, simulate
from balancer.simulator.stream import Stream
from balancer.simulator.trials import TRIALS

LUA_PREFIX = "lua:"
"""Before a policy's name: the shipped script itself, not its Python twin."""

TRIAL_PREFIX = "trial:"
"""Before the name of a rule that no pool has yet."""

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, two-sided 95 %, for 1 to 15 degrees of freedom; beyond, the normal distribution's 1.96 is close."""

MakeStream = Callable[[int], Stream]
"""The stream of a seed."""


def balancer_names() -> list[str]:
    """Everything that `make_balancer` knows."""
    shipped, tried = (LUA_PREFIX + name for name in policy_names()), (TRIAL_PREFIX + name for name in TRIALS)
    return [*TWINS, *BASELINES, *shipped, *tried]


def make_balancer(name: str) -> MakeBalancer:
    """What makes the balancer of this name; raises `InvalidInput` for a stranger."""
    if name.startswith(LUA_PREFIX) and name.removeprefix(LUA_PREFIX) in policy_names():
        return lua(name.removeprefix(LUA_PREFIX))
    if name in TWINS:
        return twin(TWINS[name])
    if name.startswith(TRIAL_PREFIX) and name.removeprefix(TRIAL_PREFIX) in TRIALS:
        return twin(TRIALS[name.removeprefix(TRIAL_PREFIX)])
    if name in BASELINES:
        return BASELINES[name]
    raise InvalidInput(f"no balancer {name!r}: there are {', '.join(balancer_names())}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % confidence interval (0 for a single seed)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Student's t over independent runs."""
        if len(values) < 2:
            return cls(values[0], 0.0)
        freedom = len(values) - 1
        t = _T_95[freedom - 1] if freedom <= len(_T_95) else 1.96
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Balancers over seeds: for each name one summary per seed, in the order of the seeds."""

    scenario: Scenario
    seeds: Sequence[int]
    summaries: Mapping[str, Sequence[Summary]]
    runs: Mapping[str, Run]
    """The first seed's runs, for plots."""

    def estimate(self, name: str, metric: str) -> Estimate:
        """A metric of `Summary`."""
        return Estimate.of([getattr(one, metric) for one in self.summaries[name]])

    def change(self, name: str, reference: str, metric: str) -> Estimate:
        """By what share a metric differs from the reference's; paired by seed: what streams have in common cancels."""
        pairs = zip(self.summaries[name], self.summaries[reference], strict=True)
        values = [(getattr(one, metric), getattr(other, metric)) for one, other in pairs]
        return Estimate.of([ours / theirs - 1 if theirs else 0.0 for ours, theirs in values])


def compare(
    names: Sequence[str], scenario: Scenario, make_stream: MakeStream, seeds: Sequence[int], tell: Told | None = None
) -> Comparison:
    """Run every balancer over every seed's stream; `tell` hears of requests dispatched in all runs together."""
    summaries: dict[str, list[Summary]] = {name: [] for name in names}
    runs: dict[str, Run] = {}
    done_before, runs_left = 0, len(names) * len(seeds)
    for seed in seeds:
        stream = make_stream(seed)
        for name in names:
            progress = None if tell is None else _shifted(tell, done_before, done_before + runs_left * len(stream))
            run = simulate(stream, scenario, make_balancer(name), seed, progress)
            summaries[name].append(summary(run))
            runs.setdefault(name, run)
            done_before += len(stream)
            runs_left -= 1
    return Comparison(scenario, seeds, summaries, runs)


def _shifted(tell: Told, before: int, total: int) -> Told:
    return lambda done, of: tell(before + done, total)


@dataclass(frozen=True, slots=True)
class Objective:
    """What users are promised, ms; None where nothing is.

    A rate at which requests wait longer and longer is no capacity, whatever the tokens do once they come: where no TTFT
    is promised, `PATIENCE_MS` is.
    """

    ttft_p99_ms: float | None = None
    tpot_p99_ms: float | None = None

    def is_met(self, result: Summary) -> bool:
        """Whether a run keeps every promise."""
        ttft_p99_ms = PATIENCE_MS if self.ttft_p99_ms is None else self.ttft_p99_ms
        return result.ttft_p99_ms <= ttft_p99_ms and (
            self.tpot_p99_ms is None or result.tpot_p99_ms <= self.tpot_p99_ms
        )


PATIENCE_MS = 10_000.0
"""What users wait for the first token where nobody has said less."""

MOST_DOUBLINGS = 5
"""How far a search for the capacity goes up from where it begins."""


def capacity_per_s(
    name: str,
    scenario: Scenario,
    stream_at: Callable[[float], Stream],
    objective: Objective,
    rate_per_s: float,
    *,
    precision: float = 0.01,
) -> float:
    """The highest arrival rate that meets the objective, within `precision` of itself; 0 where none does, infinity
    where it is more than `MOST_DOUBLINGS` doublings above `rate_per_s`.

    Searches upwards and downwards from `rate_per_s` by doubling, then halves the interval: a rate that is met is taken
    to mean that lower ones are. `stream_at` should give as many more requests as the rate is higher, so that the
    engines come to a steady state at each.
    """

    def is_met(rate: float) -> bool:
        return objective.is_met(summary(simulate(stream_at(rate), scenario, make_balancer(name))))

    low, high = 0.0, rate_per_s
    if is_met(rate_per_s):
        low, high = rate_per_s, 2 * rate_per_s
        while is_met(high):
            low, high = high, 2 * high
            if high > 2**MOST_DOUBLINGS * rate_per_s:
                return math.inf
    else:
        low = rate_per_s / 2
        while not is_met(low):
            low, high = low / 2, low
            if low < rate_per_s / 1024:
                return 0.0
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low
