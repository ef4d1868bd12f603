"""What the simulation asks of a balancer, and what it tells it: placements, reports, finished requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from balancer.simulator.engine import Progress
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream


class Moment(StrEnum):
    """When in an engine's loop its counts are read.

    `before_release`: a step's tokens are there and its complete requests not yet gone (SGLang's own snapshot).
    `after_step`: they are gone (this project's hook; what vLLM's coordinator publishes of engines in lockstep).
    `after_intake`: the next step's requests have been received (the seed's gather).
    """

    BEFORE_RELEASE = "before_release"
    AFTER_STEP = "after_step"
    AFTER_INTAKE = "after_intake"


@dataclass(frozen=True, slots=True)
class Report:
    """An engine's counts at one moment; lists by its ranks, the first of which is `first_rank` of the pool.

    `held` and `requests` count all that is here, `running` and `kv` (tokens) what decodes, `pending` the tokens of
    prompts that are not yet prefilled. `received` are the requests that these counts contain and no earlier report has
    named; `prefilling` the ranks that have prefilled in this step; `cut` what is missing of a prompt that a chunk has
    cut, for the ranks that have one.
    """

    now_s: float
    first_rank: int
    held: list[int]
    requests: list[int]
    running: list[int]
    kv: list[int]
    pending: list[int]
    received: list[int]
    prefilling: frozenset[int] | set[int]
    cut: Mapping[int, int] = field(default_factory=dict)

    def counted_by_sglang(self) -> list[int]:
        """Of each rank, KV in use and the prompts that wait: a prompt that a chunk has cut counts as far as it got."""
        return [held - self.cut.get(place, 0) for place, held in enumerate(self.held)] if self.cut else self.held


class Balancer(Protocol):
    """Chooses ranks. One object stands for all dispatchers of a pool and whatever they share."""

    @property
    def reads(self) -> Moment:
        """When it reads the engines."""

    @property
    def is_aged(self) -> bool:
        """Whether the scenario's report ages apply; a baseline has the ages of its source."""

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """The ranks for these requests, which arrive together; they are dispatched there."""

    def observe(self, now_s: float, report: Report) -> None:
        """A report can be read from now on."""

    def complete(self, index: int) -> None:
        """The last token of a request has reached its dispatcher."""


MakeBalancer = Callable[[Scenario, Stream, Progress, int], Balancer]
"""Makes a balancer for one run; the last argument is the run's seed."""
