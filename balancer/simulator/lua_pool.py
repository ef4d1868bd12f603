"""The project's own pool in the simulation: the shipped scripts, called through the same protocol as in production.

Every placement is one `dispatch`, every report one `report`, byte for byte what Redis would run; only the clock is the
simulation's. State is always shared: that is what the scripts are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from balancer import protocol
from balancer.errors import InvalidInput
from balancer.model import Incarnation, Placement, RankCounts, Request
from balancer.model import Report as EngineReport
from balancer.scripts import load_script
from balancer.simulator.balancing import MakeBalancer, Moment, Report
from balancer.simulator.engine import Progress
from balancer.simulator.lua_redis import LuaRedis
from balancer.simulator.scenario import Scenario
from balancer.simulator.stream import Stream, request_id

POOL = "simulated"
_T = TypeVar("_T")
_HOUR_MS = 3_600_000


class LuaPool:
    """A pool on a `LuaRedis`, with one of the policies in `lua/policies`."""

    reads = Moment.AFTER_STEP
    is_aged = True

    def __init__(self, scenario: Scenario, stream: Stream, policy: str, settings: dict[str, object]) -> None:
        if not scenario.shared:
            raise InvalidInput("the shipped Lua shares its state: private views are simulated by the Python policies")
        self._stream = stream
        self._redis = LuaRedis()
        self._begun_ms = self._redis.now_ms
        # Leases do not end here: the simulation's engines and dispatchers do not die, and steps may be long.
        leases = {"engine_lease_ms": 24 * _HOUR_MS, "booking_lease_ms": 24 * _HOUR_MS}
        self._perform(protocol.configure(POOL, {"policy": policy, **leases, **settings}))
        self._engines: list[Incarnation] = []
        self._steps = [0] * scenario.engines
        for number in range(scenario.engines):
            joining = Incarnation(engine=f"engine-{number:03}", size=scenario.ranks, nonce="simulated")
            self._engines.append(self._perform(protocol.join(POOL, joining)))
        names = [rank for engine in self._engines for rank in engine.ranks]
        # The simulation's ranks have no names; they are numbered in the order in which Redis sorts names, so that a
        # twin, which knows numbers only, breaks ties alike.
        self._number = {name: number for number, name in enumerate(sorted(names))}
        self._order = [[self._number[rank] for rank in engine.ranks] for engine in self._engines]

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> Sequence[int]:
        """One dispatch."""
        self._set_clock(now_s)
        requests = [Request(request_id(index), self._stream.input_tokens[index]) for index in indices]
        placed = self._perform(protocol.dispatch(POOL, f"dispatcher-{dispatcher}", requests)).outcomes
        return [self._number[outcome.rank] for outcome in placed if isinstance(outcome, Placement)]

    def observe(self, now_s: float, report: Report) -> None:
        """One report."""
        self._set_clock(now_s)
        number = report.first_rank // len(report.held)
        self._steps[number] += 1
        counts = [
            RankCounts(report.held[rank - report.first_rank], report.requests[rank - report.first_rank])
            for rank in self._order[number]
        ]
        received = [self._stream.ids[index] for index in report.received]
        told = EngineReport(self._steps[number], counts, received)
        self._perform(protocol.report(POOL, self._engines[number], told))

    def complete(self, index: int) -> None:
        """Nothing: the engine's own counts say so."""

    def _set_clock(self, now_s: float) -> None:
        self._redis.now_ms = self._begun_ms + int(now_s * 1000)

    def _perform(self, operation: protocol.Operation[_T]) -> _T:
        reply = self._redis.evaluate(load_script(operation.script), operation.keys, operation.arguments)
        assert isinstance(reply, list)
        return operation.read(reply)


def lua(policy: str, **settings: object) -> MakeBalancer:
    """Makes pools with the shipped `policy`; `settings` are the pool's own."""

    def make(scenario: Scenario, stream: Stream, progress: Progress, seed: int) -> LuaPool:
        return LuaPool(scenario, stream, policy, settings)

    return make
