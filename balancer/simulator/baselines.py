"""What engines do today, as their sources do it: SGLang's total_tokens, vLLM's score, the seed's minimum_tokens.

Each has the ages that its source gives it, so the scenario's `report_age_s` does not apply; how many dispatchers there
are does. Read in SGLang 0.5.23, vLLM 0.33.0 and SGLang 0.5.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from balancer.simulator.balancing import MakeBalancer, Moment, Report
from balancer.simulator.engine import Progress
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream


class SglangTotalTokens:
    """SGLang 0.5.23, `--load-balance-method total_tokens` (managers/data_parallel_controller.py, DPBudget).

    A scheduler writes a snapshot of its counts at the begin of `process_batch_result`: after each prefill, and after
    every 15th decode step. It counts the KV in use and the prompts that wait, so that of a prompt that a chunk has cut
    the rest is missing. A dispatch first reads all snapshots unless it has within 20 ms; one with a new time
    replaces the rank's budget, and with it what was added for requests that it does not contain. Then the least
    (tokens, requests), the first of equals; the prompt's tokens and one request are added to the budget. There is one
    controller for an engine; with several dispatchers each has a budget of its own, as gateways with a load feed do.
    """

    reads = Moment.BEFORE_RELEASE
    is_aged = False
    REFRESH_S = 0.020
    PUBLISH_EVERY = 15

    def __init__(self, scenario: Scenario, stream: Stream, progress: Progress, seed: int) -> None:
        ranks = scenario.all_ranks
        self._stream = stream
        self._snapshots = [(0.0, 0, 0)] * ranks
        self._unpublished = [0] * ranks
        self._budgets = [_Budget(ranks) for _ in range(scenario.dispatchers)]

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """One refresh for a list (`dispatch_batch_generate`), then one after the other."""
        budget = self._budgets[dispatcher]
        if now_s - budget.refreshed_s >= self.REFRESH_S:
            budget.refreshed_s = now_s
            budget.update(self._snapshots)
        return [budget.dispatch(self._stream.input_tokens[index]) for index in indices]

    def observe(self, now_s: float, report: Report) -> None:
        """Schedulers publish what is due."""
        for place, held in enumerate(report.counted_by_sglang()):
            rank = report.first_rank + place
            self._unpublished[rank] += 1
            idle = not report.requests[place]  # an idle rank publishes at once
            if idle or place in report.prefilling or self._unpublished[rank] >= self.PUBLISH_EVERY:
                self._unpublished[rank] = 0
                self._snapshots[rank] = (now_s, held, report.requests[place])

    def complete(self, index: int) -> None:
        """Nothing: the controller does not see outputs."""


class _Budget:
    """DPBudget."""

    def __init__(self, ranks: int) -> None:
        self.refreshed_s = 0.0
        self._tokens, self._requests, self._taken_s = [0] * ranks, [0] * ranks, [0.0] * ranks

    def update(self, snapshots: Sequence[tuple[float, int, int]]) -> None:
        for rank, (taken_s, tokens, requests) in enumerate(snapshots):
            if taken_s != self._taken_s[rank]:
                self._taken_s[rank] = taken_s
                self._tokens[rank], self._requests[rank] = tokens, requests

    def dispatch(self, tokens: int) -> int:
        rank = min(range(len(self._tokens)), key=lambda rank: (self._tokens[rank], self._requests[rank]))
        self._requests[rank] += 1
        self._tokens[rank] += tokens
        return rank


class VllmScore:
    """vLLM 0.33.0's internal balancer (v1/engine/core_client.py, get_core_engine_for_request).

    Engines tell the coordinator their waiting and running requests before and after each step. It publishes all counts,
    when they have changed, at most every 100 ms; of engines in lockstep (any with experts, as here) those that the last
    complete step ended with. A publication replaces each API server's copy and what it has added there. An API
    server knows its own unfinished requests exactly and takes the others to have as many:

        score = max(servers x own unfinished, waiting + running) + waiting x 6 x max(0, KV usage - 0.5)

    The least score wins; the scan for it begins one rank further after each choice, and `waiting` of the chosen rank
    grows by the number of servers.
    """

    reads = Moment.AFTER_STEP
    is_aged = False
    PUBLISH_S = 0.100

    def __init__(self, scenario: Scenario, stream: Stream, progress: Progress, seed: int) -> None:
        ranks, servers = scenario.all_ranks, scenario.dispatchers
        self._progress, self._servers = progress, servers
        self._capacity = scenario.profile.kv_capacity_tokens
        self._counts: list[list[float]] = [[0, 0, 0.0] for _ in range(ranks)]
        self._published_s = -self.PUBLISH_S
        self._changed_s: float | None = None  # since when the coordinator knows more than it has published
        self._copies: list[list[list[float]]] = [[[0, 0, 0.0] for _ in range(ranks)] for _ in range(servers)]
        self._unfinished = [[0] * ranks for _ in range(servers)]
        self._starts = [ranks * server // servers for server in range(servers)]
        self._server_of: dict[int, int] = {}

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """Requests reach an API server one by one, in a list too."""
        self._publish_if_due(now_s)
        return [self._choose(dispatcher, index) for index in indices]

    def observe(self, now_s: float, report: Report) -> None:
        """The coordinator gets an engine's counts."""
        self._publish_if_due(now_s)
        for place, running in enumerate(report.running):
            waiting = report.requests[place] - running
            self._counts[report.first_rank + place] = [waiting, running, report.kv[place] / self._capacity]
        self._changed_s = now_s if self._changed_s is None else self._changed_s
        self._publish_if_due(now_s)

    def complete(self, index: int) -> None:
        """The API server that sent it has one unfinished request less."""
        self._unfinished[self._server_of.pop(index)][self._progress.rank[index]] -= 1

    def _publish_if_due(self, now_s: float) -> None:
        if self._changed_s is None:
            return
        due_s = max(self._published_s + self.PUBLISH_S, self._changed_s)
        if now_s >= due_s:
            self._published_s, self._changed_s = due_s, None
            self._copies = [[counts[:] for counts in self._counts] for _ in range(self._servers)]

    def _choose(self, server: int, index: int) -> int:
        copy, unfinished, ranks = self._copies[server], self._unfinished[server], len(self._counts)
        best, least = 0, float("inf")
        for offset in range(ranks):
            rank = (self._starts[server] + offset) % ranks
            waiting, running, kv_usage = copy[rank]
            score = max(self._servers * unfinished[rank], waiting + running)
            if waiting:
                score += waiting * 6.0 * max(0.0, kv_usage - 0.5)
            if score < least:
                best, least = rank, score
        copy[best][0] += self._servers
        self._starts[server] = (self._starts[server] + 1) % ranks
        unfinished[best] += 1
        self._server_of[index] = server
        return best


class Seed:
    """SGLang 0.5.1's minimum_tokens (PR 7379): this project's rule with its counts up to 40 steps old.

    Every 40th step, before it runs, the ranks' tokens (counted as SGLang still does) are gathered and replace the
    published ones, and the ids received since are taken from those in flight. The least sum, the first of equals. State
    is in shared memory under one lock, so all dispatchers of a node share it.
    """

    reads = Moment.AFTER_INTAKE
    is_aged = False
    STEPS = 40

    def __init__(self, scenario: Scenario, stream: Stream, progress: Progress, seed: int) -> None:
        self._stream, self._progress = stream, progress
        self._local = [0] * scenario.all_ranks
        self._in_flight = [0] * scenario.all_ranks
        self._steps = [0] * scenario.engines
        self._received: list[list[int]] = [[] for _ in range(scenario.engines)]

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """One after the other, under the lock."""
        ranks = []
        for index in indices:
            sums = [local + flying for local, flying in zip(self._local, self._in_flight, strict=True)]
            rank = sums.index(min(sums))
            self._in_flight[rank] += self._stream.input_tokens[index]
            ranks.append(rank)
        return ranks

    def observe(self, now_s: float, report: Report) -> None:
        """A step begins; every 40th publishes."""
        engine = report.first_rank // len(report.held)
        self._received[engine] += report.received
        self._steps[engine] += 1
        if self._steps[engine] % self.STEPS:
            return
        self._local[report.first_rank : report.first_rank + len(report.held)] = report.counted_by_sglang()
        for index in self._received[engine]:
            self._in_flight[self._progress.rank[index]] -= self._stream.input_tokens[index]
        self._received[engine] = []

    def complete(self, index: int) -> None:
        """Nothing: the dispatcher does not see outputs."""


BASELINES: Mapping[str, MakeBalancer] = {"sglang_total_tokens": SglangTotalTokens, "vllm": VllmScore, "seed": Seed}
"""Baselines by name."""
