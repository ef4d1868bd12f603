"""One dispatcher replica of the demo: a process of its own that places its share of the requests and times them.

It says `{"ready": true}` and reads one line of JSON (`Orders`). Each request is dispatched at its time, sent to its
rank and followed to its last token. As requests finish it says `{"finished": n}`, and at the end all
times in one line. It ends with its parent: the closed input ends it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict, dataclass

import orjson

from balancer import AsyncDispatcher, BalancerError
from scheduler_hooks.demo.measure import Served, Times
from scheduler_hooks.mock_engine.client import MockEngineClient

_TELL_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Orders:
    """What a replica is to do. `requests` are (arrival in s after `start_s`, request id, input and output tokens);
    `start_s` is a time of the host's monotonic clock; `name` this dispatcher's name in its bookings."""

    url: str
    pool: str
    name: str
    rank_ports: list[int]
    start_s: float
    requests: list[tuple[float, str, int, int]]


@dataclass(slots=True)
class _Open:
    """A request under way: its rank, when it arrived and was dispatched, its first and last token (s, monotonic)."""

    rank: int
    arrived_s: float
    dispatched_s: float
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class Replica:
    """Dispatches, sends and times the requests of its orders."""

    def __init__(self, orders: Orders, dispatcher: AsyncDispatcher, engine: MockEngineClient) -> None:
        self._orders, self._dispatcher, self._engine = orders, dispatcher, engine
        self._open: dict[str, _Open] = {}
        self.times = Times()

    async def run(self) -> None:
        """Serve all requests. Raises an ExceptionGroup: BalancerError when a request has no rank, ConnectionError when
        the engine refuses one or ends."""
        telling = asyncio.create_task(self._tell())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                for request in self._orders.requests:
                    group.create_task(self._send(*request))
        finally:
            telling.cancel()

    async def _send(self, arrival_s: float, request_id: str, input_tokens: int, output_tokens: int) -> None:
        arrived_s = self._orders.start_s + arrival_s
        await asyncio.sleep(arrived_s - time.monotonic())
        asked_s = time.monotonic()
        async with self._dispatcher.booking(request_id, input_tokens) as placement:
            dispatched_s = time.monotonic()
            self.times.dispatch_ms.append((dispatched_s - asked_s) * 1e3)
            self._open[request_id] = _Open(placement.index, arrived_s, dispatched_s)
            self._engine.send(placement.index, request_id, input_tokens, output_tokens)
        self.times.input_tokens += input_tokens
        self.times.first_s = min(self.times.first_s, arrived_s)

    async def _follow(self) -> None:
        if not self._orders.requests:
            return
        async for _, event in self._engine.events():
            if event.error is not None:
                raise ConnectionError(f"the engine refused {event.request_id}: {event.error}")
            for request_id, _ in event.tokens:
                self._token(self._open[request_id], event.t)
            for request_id in event.finished:
                self._finished(request_id, self._open.pop(request_id))
                self.times.last_s = event.t
            if len(self.times.e2e_ms) == len(self._orders.requests):
                return
        raise ConnectionError("the engine ended before its requests")

    def _token(self, request: _Open, now_s: float) -> None:
        if request.last_token_s:
            self.times.itl_ms.append((now_s - request.last_token_s) * 1e3)
        else:
            self.times.ttft_ms.append((now_s - request.arrived_s) * 1e3)
            request.first_token_s = now_s
        request.last_token_s = now_s
        self.times.output_tokens += 1

    def _finished(self, request_id: str, request: _Open) -> None:
        last_s = request.last_token_s
        self.times.e2e_ms.append((last_s - request.arrived_s) * 1e3)
        self.times.served.append(
            Served(request_id, request.rank, request.arrived_s, request.dispatched_s, request.first_token_s, last_s)
        )

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            _say({"finished": len(self.times.e2e_ms)})


async def _serve(orders: Orders) -> None:
    async with (
        AsyncDispatcher.connect(orders.url, orders.pool, name=orders.name, budget_ms=2_000) as dispatcher,
        await MockEngineClient.connect(orders.rank_ports) as engine,
    ):
        replica = Replica(orders, dispatcher, engine)
        serving = asyncio.ensure_future(replica.run())
        loop = asyncio.get_running_loop()
        orphaned = loop.create_future()
        loop.add_reader(sys.stdin.fileno(), orphaned.cancel)  # nothing more is ever said: the input has closed
        await asyncio.wait((serving, orphaned), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            sys.exit("replica: its parent is gone")
        serving.result()
        _say({"times": asdict(replica.times)})


def _say(message: dict[str, object]) -> None:
    sys.stdout.buffer.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


def main() -> int:
    """Read the orders and carry them out."""
    _say({"ready": True})
    orders = Orders(**orjson.loads(sys.stdin.buffer.readline()))
    try:
        asyncio.run(_serve(orders))
    except ExceptionGroup as group:
        problem = group.exceptions[0]
        if not isinstance(problem, BalancerError | ConnectionError):
            raise
        print(f"replica {orders.name}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
