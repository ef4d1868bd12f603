"""The simulation: arrivals, steps and reports in order of time, until every request is complete.

Three kinds of events. An arrival is placed by the balancer and sent. A step's end lets tokens appear, requests leave
and arrived ones in, and begins the next step at once; an idle engine begins with the next arrival. A report becomes
readable some time after the moment that it describes. Of events at one moment, reports come first, then arrivals.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from balancer.simulator.balancing import Balancer, MakeBalancer, Moment, Report
from balancer.simulator.engine import Engine, Progress
from balancer.simulator.recorder import Recorder
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream

REGRET_EVERY = 8
"""Every how many-th placement is compared with the best one."""
_PROGRESS_EVERY = 1_024

Told = Callable[[int, int], None]
"""Told how many requests have been dispatched, and of how many."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run."""

    scenario: Scenario
    stream: Stream
    progress: Progress
    recorder: Recorder


def simulate(stream: Stream, scenario: Scenario, make: MakeBalancer, seed: int = 0, tell: Told | None = None) -> Run:
    """Run `stream` through `scenario`; the same arguments give the same run."""
    return _Simulation(stream, scenario, make, seed).run(tell or (lambda done, of: None))


class _Simulation:
    def __init__(self, stream: Stream, scenario: Scenario, make: MakeBalancer, seed: int) -> None:
        self._stream, self._scenario = stream, scenario
        self._progress = Progress.of(len(stream))
        self._balancer: Balancer = make(scenario, stream, self._progress, seed)
        self._engines = [
            Engine(scenario, stream, self._progress, number * scenario.ranks) for number in range(scenario.engines)
        ]
        self._recorder = Recorder(scenario, stream)
        self._dispatchers = random.Random(f"{seed}/dispatchers")
        self._wakes: list[tuple[float, int]] = []
        self._awake = [False] * scenario.engines
        self._steps = [0] * scenario.engines
        self._reports: deque[tuple[float, Report]] = deque()
        self._received: list[deque[tuple[float, int]]] = [deque() for _ in range(scenario.engines)]
        aged = self._balancer.is_aged
        self._age_s = scenario.report_age_s if aged else 0.0
        self._held_back_s = max(0.0, scenario.acknowledgement_age_s - self._age_s) if aged else 0.0
        self._report_every = scenario.report_every if aged else 1

    def run(self, tell: Told) -> Run:
        arrivals, wakes, reports = self._stream.arrival_s, self._wakes, self._reports
        count, at, told = len(arrivals), 0, 0
        while True:
            arrival_s = arrivals[at] if at < count else math.inf
            wake_s = wakes[0][0] if wakes else math.inf
            if reports and reports[0][0] <= arrival_s and reports[0][0] <= wake_s:
                readable_s, report = reports.popleft()
                self._balancer.observe(readable_s, report)
            elif arrival_s <= wake_s and at < count:
                at = self._dispatch(at)
                if at - told >= _PROGRESS_EVERY:
                    told = at
                    tell(at, count)
            elif wakes:
                self._wake(*heapq.heappop(wakes))
            else:
                break
        tell(count, count)
        return Run(self._scenario, self._stream, self._progress, self._recorder)

    def _dispatch(self, at: int) -> int:
        """Place the request `at`, or a list that begins with it; returns the next one."""
        now_s = self._stream.arrival_s[at]
        scenario, progress = self._scenario, self._progress
        until = at + 1
        while until - at < scenario.list_size and until < len(self._stream) and self._stream.arrival_s[until] == now_s:
            until += 1
        dispatcher = self._dispatchers.randrange(scenario.dispatchers) if scenario.dispatchers > 1 else 0
        ranks = self._balancer.place(now_s, dispatcher, range(at, until))
        for index, rank in zip(range(at, until), ranks, strict=True):
            if index % REGRET_EVERY == 0:
                self._recorder.placed(index, rank, self._engines)
            progress.rank[index] = rank
            progress.dispatched_s[index] = now_s
            number, place = divmod(rank, scenario.ranks)
            self._engines[number].send(index, place, now_s + scenario.send_s)
            if not self._awake[number]:
                self._awake[number] = True
                heapq.heappush(self._wakes, (now_s + scenario.send_s, number))
        return until

    def _wake(self, now_s: float, number: int) -> None:
        """A step of this engine has ended, or a request has reached it while it was idle."""
        engine, reads = self._engines[number], self._balancer.reads
        if engine.stepping:
            self._received[number].extend((now_s, index) for index in engine.taken)
            engine.grow(now_s)
            if reads is Moment.BEFORE_RELEASE:
                self._report(now_s, number)
            engine.release(now_s)
            for index in engine.finished:
                self._balancer.complete(index)
            self._steps[number] += 1
            if reads is Moment.AFTER_STEP and (
                self._steps[number] % self._report_every == 0 or not any(engine.requests)
            ):
                self._report(now_s, number)
        engine.take(now_s)
        if reads is Moment.AFTER_INTAKE:
            self._received[number].extend((now_s, index) for index in engine.taken)
            self._report(now_s, number)
            engine.taken = []
        cost = engine.begin()
        if cost is not None:
            self._recorder.step(now_s, engine, cost)
            heapq.heappush(self._wakes, (now_s + cost.duration_s, number))
        elif engine.next_mail_s is not None:
            heapq.heappush(self._wakes, (engine.next_mail_s, number))
        else:
            self._awake[number] = False

    def _report(self, now_s: float, number: int) -> None:
        engine, waiting = self._engines[number], self._received[number]
        received = []
        while waiting and waiting[0][0] + self._held_back_s <= now_s:
            received.append(waiting.popleft()[1])
        report = Report(
            now_s,
            engine.first_rank,
            engine.held[:],
            engine.requests[:],
            engine.running[:],
            engine.kv[:],
            engine.pending[:],
            received,
            engine.prefilling,
            engine.cut,
        )
        if self._age_s:
            self._reports.append((now_s + self._age_s, report))
        else:
            self._balancer.observe(now_s, report)
