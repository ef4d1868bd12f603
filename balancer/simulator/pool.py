"""The project's state in Python: holding counts from reports, bookings that only a report's received ids end.

Shared, all dispatchers book in one view, as with Redis. Private, each has a view of its own: the same reports, but only
its own bookings, as a balancer inside each replica would have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import add

from balancer.simulator.balancing import MakeBalancer, Moment, Report
from balancer.simulator.engine import Progress
from balancer.simulator.policies import TURNS, Loads, Policy
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream


class TwinPool:
    """A pool whose ranks are chosen by a policy of `balancer.simulator.policies`."""

    reads = Moment.AFTER_STEP
    is_aged = True

    def __init__(
        self, scenario: Scenario, stream: Stream, progress: Progress, make_policy: Callable[[int], Policy]
    ) -> None:
        ranks = scenario.all_ranks
        self._stream, self._progress, self._shared = stream, progress, scenario.shared
        self._holding, self._requests, self._pending = [0] * ranks, [0] * ranks, [0] * ranks
        self._views = [_View(ranks, make_policy(ranks)) for _ in range(1 if scenario.shared else scenario.dispatchers)]
        self._owner: dict[int, _View] = {}

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """Choose and book; a list largest first, each request with those before it in place."""
        view = self._views[0 if self._shared else dispatcher]
        if view.is_old:
            view.refresh(self._holding, self._requests, self._pending)
        inputs, ids = self._stream.input_tokens, self._stream.ids
        chosen: dict[int, int] = {}
        for index in indices if len(indices) == 1 else sorted(indices, key=lambda index: -inputs[index]):
            rank = view.policy.choose(view.loads, inputs[index], ids[index] % TURNS)
            view.book(rank, inputs[index])
            self._owner[index] = view
            chosen[index] = rank
        return [chosen[index] for index in indices]

    def observe(self, now_s: float, report: Report) -> None:
        """Holding counts are replaced, bookings that they contain end."""
        first = report.first_rank
        self._holding[first : first + len(report.held)] = report.held
        self._requests[first : first + len(report.held)] = report.requests
        self._pending[first : first + len(report.held)] = report.pending
        for index in report.received:
            self._owner.pop(index).end(self._progress.rank[index], self._stream.input_tokens[index])
        for view in self._views:
            view.is_old = True

    def complete(self, index: int) -> None:
        """Nothing: the engine's own counts say so."""


class _View:
    """The bookings that one side knows, and what its policy sees of the ranks."""

    def __init__(self, ranks: int, policy: Policy) -> None:
        self.policy = policy
        self.loads = Loads([0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks)
        self.is_old = False
        self._in_flight, self._in_flight_requests = [0] * ranks, [0] * ranks

    def refresh(self, holding: list[int], requests: list[int], pending: list[int]) -> None:
        self.loads.tokens = list(map(add, holding, self._in_flight))
        self.loads.requests = list(map(add, requests, self._in_flight_requests))
        self.loads.pending = list(map(add, pending, self._in_flight))
        self.loads.in_flight = list(self._in_flight)
        self.is_old = False

    def book(self, rank: int, tokens: int) -> None:
        self._in_flight[rank] += tokens
        self._in_flight_requests[rank] += 1
        self.loads.tokens[rank] += tokens
        self.loads.requests[rank] += 1
        self.loads.pending[rank] += tokens
        self.loads.in_flight[rank] += tokens

    def end(self, rank: int, tokens: int) -> None:
        self._in_flight[rank] -= tokens
        self._in_flight_requests[rank] -= 1


def twin(make_policy: Callable[[int], Policy]) -> MakeBalancer:
    """Makes pools with this policy, which is made for a number of ranks."""

    def make(scenario: Scenario, stream: Stream, progress: Progress, seed: int) -> TwinPool:
        return TwinPool(scenario, stream, progress, make_policy)

    return make
