"""What a run leaves behind: sums over its steps, series for plots, and how good its placements were.

Only steps and placements of the measured part count (`Scenario.warm_up`, `cool_down`); series cover the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balancer.simulator.engine import Engine, StepCost
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream

SAMPLES = 600
"""Most points of a series."""


@dataclass(slots=True)
class Sample:
    """One engine at the begin of one step: held tokens and requests of each rank, and what the step costs, in s."""

    now_s: float
    engine: int
    held: list[int]
    requests: list[int]
    duration_s: float
    balanced_s: float


class Recorder:
    """Sums over the measured steps, weighted by their duration; seconds."""

    def __init__(self, scenario: Scenario, stream: Stream) -> None:
        count = len(stream)
        self.first_measured = int(count * scenario.warm_up)
        self.last_measured = count - int(count * scenario.cool_down) - 1
        self.from_s = stream.arrival_s[self.first_measured] if scenario.warm_up else 0.0
        self.until_s = stream.arrival_s[self.last_measured] if scenario.cool_down else float("inf")
        if stream.arrival_s[0] == stream.arrival_s[-1]:  # all at once: the shares are of requests, not of time
            self.until_s = float("inf")
        self.steps = 0
        self.wall_s = self.waste_s = self.kv_ratio_s = self.request_ratio_s = self.regret_s = 0.0
        self.placements = 0
        self.generated_tokens = 0
        self.samples: list[Sample] = []
        self._profile, self._size, self._stream = scenario.profile, scenario.ranks, stream
        self._sample_every = 1
        self._seen = 0

    def step(self, now_s: float, engine: Engine, cost: StepCost) -> None:
        """A step begins."""
        self.count(now_s, engine.first_rank // self._size, engine.held, engine.requests, cost)

    def count(self, now_s: float, engine: int, held: list[int], requests: list[int], cost: StepCost) -> None:
        """A step of the engine of this number begins, and its ranks hold so many tokens and requests."""
        if self._seen % self._sample_every == 0:
            self._sample(Sample(now_s, engine, held[:], requests[:], cost.duration_s, cost.balanced_s))
        self._seen += 1
        if not self.from_s <= now_s <= self.until_s:
            return
        self.steps += 1
        duration_s = cost.duration_s
        self.wall_s += duration_s
        self.waste_s += duration_s - cost.balanced_s
        self.kv_ratio_s += duration_s * _max_to_mean(held, self._size)
        self.request_ratio_s += duration_s * _max_to_mean(requests, self._size)

    def placed(self, index: int, rank: int, engines: Sequence[Engine]) -> None:
        """A placement, before it is made: what it adds to the next step, beside what the best rank would have added.

        Everything held and on its way counts, whoever knows of it. A placement that leaves the dearest rank of its
        engine the dearest adds nothing.
        """
        if not self.first_measured <= index <= self.last_measured:
            return
        kv_s, request_s = self._profile.kv_ns / 1e9, self._profile.request_us / 1e6
        price_s = kv_s * self._stream.input_tokens[index] + request_s
        added: list[float] = []
        for engine in engines:
            costs = [
                kv_s * (held + coming) + request_s * (count + more)
                for held, coming, count, more in zip(
                    engine.held, engine.coming_tokens, engine.requests, engine.coming_requests, strict=True
                )
            ]
            room_s = max(costs) - price_s
            added += [cost - room_s for cost in costs]
        self.placements += 1
        self.regret_s += max(0.0, added[rank]) - max(0.0, min(added))

    def _sample(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) > SAMPLES:
            del self.samples[1::2]
            self._sample_every *= 2


def _max_to_mean(values: list[int], size: int) -> float:
    total = sum(values)
    return max(values) * size / total if total else 1.0
