"""One rank: the loop that turns arrivals into steps, steps into tokens, and tells the hook after each.

    boundary: see what came ─► step the queues ─► barrier: when does it end? ─► sleep ─► tokens ─► hook

It joins the pieces and decides nothing itself: prices are `cost`'s, queues `scheduler`'s, time `barrier`'s,
sockets `connections`', messages `wire`'s. Runs in a forked process of its own (`engine`), on one thread;
the hook may have others.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from balancer import in_flight_id
from scheduler_hooks.mock_engine.barrier import Agreement, RankRow, StepBarrier
from scheduler_hooks.mock_engine.connections import ClientConnections
from scheduler_hooks.mock_engine.cost import NS_PER_MS, CostModel
from scheduler_hooks.mock_engine.hook import AfterStep
from scheduler_hooks.mock_engine.scheduler import RankScheduler, Rejected, Step
from scheduler_hooks.mock_engine.wire import Abort, Arrival, BadMessage, error_line, parse_message, step_line


@dataclass(slots=True)
class _Outgoing:
    """What one step means to one connection."""

    tokens: list[tuple[str, int]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)


class Rank:
    """A rank of the mock engine. `on_step` hears of each step whose end is agreed (rank 0's statistics)."""

    def __init__(
        self,
        clients: ClientConnections,
        scheduler: RankScheduler,
        cost: CostModel,
        barrier: StepBarrier,
        hook: AfterStep | None,
        on_step: Callable[[Agreement], None] | None = None,
    ) -> None:
        self._clients = clients
        self._scheduler = scheduler
        self._cost = cost
        self._barrier = barrier
        self._hook = hook
        self._on_step = on_step
        self._owner: dict[str, int] = {}
        self._received: list[str] = []
        self._aborted: list[tuple[int, str]] = []

    def serve(self, ready: Callable[[], None]) -> None:
        """Step until the engine is told to stop; calls `ready` after the first step, when all ranks have met.

        Raises `EngineGone` when another part of the engine ends before that.
        """
        stop = False
        while not stop:
            self._boundary()
            step = self._scheduler.step()
            agreement = self._meet(step)
            _sleep_until(agreement.end_ns)
            self._send(agreement, step)
            self._tell_hook()
            if agreement.step == 1:
                ready()
            stop = agreement.stop

    def close(self) -> None:
        """Close the clients' connections, then the hook, which takes this engine's keys away."""
        self._clients.close()
        if self._hook:
            self._hook.close()

    def _meet(self, step: Step) -> Agreement:
        step_ns = int(self._cost.step_ms(step.work) * NS_PER_MS)
        row = RankRow(step_ns, self._scheduler.holding_tokens, self._scheduler.requests)
        agreement = self._barrier.agree(row, self._clients)
        if self._on_step:
            self._on_step(agreement)
        return agreement

    def _boundary(self) -> None:
        """See what clients sent since the last step."""
        seen = self._clients.see()
        for connection, line in seen.lines:
            try:
                self._take(connection, parse_message(line))
            except BadMessage as error:
                self._clients.send(connection, error_line(str(error), error.request_id))
        if seen.closed:
            closed = set(seen.closed)
            for request_id in [name for name, owner in self._owner.items() if owner in closed]:
                self._scheduler.abort(request_id)
                del self._owner[request_id]

    def _take(self, connection: int, message: Arrival | Abort) -> None:
        request_id = message.request_id
        if isinstance(message, Abort):
            if self._scheduler.abort(request_id):
                self._aborted.append((self._owner.pop(request_id), request_id))
            return
        try:
            self._scheduler.receive(request_id, message.input_tokens, message.output_tokens)
        except Rejected as error:
            self._clients.send(connection, error_line(str(error), request_id))
            if self._scheduler.holds(request_id):
                return  # a second one of that id: the first has been or will be acknowledged
        else:
            self._owner[request_id] = connection
        self._received.append(request_id)  # a rejected one too: it has come, so it is in flight no longer

    def _send(self, agreement: Agreement, step: Step) -> None:
        """One line per connection that has a part in this step."""
        outgoing: defaultdict[int, _Outgoing] = defaultdict(_Outgoing)
        for token in step.tokens.items():
            outgoing[self._owner[token[0]]].tokens.append(token)
        for request_id in step.finished:
            outgoing[self._owner.pop(request_id)].finished.append(request_id)
        for connection, request_id in self._aborted:
            outgoing[connection].aborted.append(request_id)
        self._aborted.clear()
        t = agreement.end_ns / 1e9
        for connection, out in outgoing.items():
            self._clients.send(connection, step_line(agreement.step, t, out.tokens, out.finished, out.aborted))

    def _tell_hook(self) -> None:
        if self._hook:
            scheduler = self._scheduler
            received = {in_flight_id(name): scheduler.holding_tokens_of(name) for name in self._received}
            self._hook.after_step(scheduler.holding_tokens, scheduler.requests, received)
        self._received.clear()


def _sleep_until(end_ns: int) -> None:
    remaining_ns = end_ns - time.monotonic_ns()
    if remaining_ns > 0:
        time.sleep(remaining_ns / 1e9)
