"""The dispatcher: give it a request's id and tokens, get the rank to send it to. Sync and async.

    dispatcher = Dispatcher.connect("redis://10.0.0.5:6379/0", pool="chat")
    with dispatcher.booking("req-1", tokens=812) as placement:
        send(request, to=placement.rank)        # raises? then the booking is released

Any number of dispatchers, in any processes on any nodes, share the pool's state; one request is one EVAL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from balancer import protocol
from balancer.breaker import Breaker
from balancer.errors import NoRank
from balancer.last_known import LastKnown
from balancer.model import Placement, PoolSnapshot, Request, Scope
from balancer.placing import Counters, Placing, perform, perform_async
from balancer.protocol import ANYWHERE
from balancer.settings import Settings
from balancer.store import AsyncStore, Store


def _placing(settings: Settings) -> Placing:
    breaker = Breaker(settings.probe_ms, opens_after=settings.opens_after)
    return Placing(settings.pool, settings.name, breaker, LastKnown())


class Dispatcher:
    """Places requests on the ranks of one pool. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self._store = Store(settings)
        self._placing = _placing(settings)

    @classmethod
    def connect(cls, url: str | None = None, pool: str | None = None, **settings: str | int | None) -> Dispatcher:
        """A dispatcher for `pool` at `url`; what is not given comes from the environment (`balancer.settings`)."""
        return cls(Settings.from_environment(None, url=url, pool=pool, **settings))

    @property
    def counters(self) -> Counters:
        """How many requests went which way."""
        return self._placing.counters

    @property
    def is_falling_back(self) -> bool:
        """Whether Redis is taken to be away."""
        return self._placing.breaker.is_open

    def dispatch(self, request_id: str, tokens: int, among: Sequence[str] = (), avoid: Sequence[str] = ()) -> Placement:
        """Choose a rank for one request and book it there.

        `request_id`: 1 to 512 bytes; a repeat returns the first placement. `tokens`: of the prompt, 1 to 2**31 - 1.
        `among`: the ranks that may be chosen (`engine/index`), any where there are none; `avoid`: those that may not. A
        request that is booked already keeps its rank.
        Raises `NoRank` with its reason, `InvalidInput`, or `Refused`; while Redis is away the answer comes from the
        last known loads (`placement.outcome` says so), and `NoRank` (unreachable) only where none was ever seen, or
        `StoreDenied` where Redis is away because it refuses us.
        """
        return _single(self.dispatch_many([Request(request_id, tokens)], among, avoid))

    def dispatch_many(
        self, requests: Iterable[Request], among: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> list[Placement | NoRank]:
        """Place a list of requests, one EVAL for every 256; the answers stand in the order given.

        A request without a rank gets its `NoRank` as an answer, so that the others keep theirs.
        """
        scope = Scope(among, avoid) if among or avoid else ANYWHERE
        return perform(self._placing.dispatch(list(requests), scope), self._store.run)

    def release(self, *request_ids: str) -> int:
        """End bookings that no engine will acknowledge; returns how many there were. Repeating is harmless.

        Never raises for an absent Redis: they are released with a dispatch after its return, or by their lease.
        """
        return perform(self._placing.release(request_ids), self._store.run)

    def renew(self, *bookings: tuple[str, int]) -> int:
        """Begin the leases of bookings anew, each a request id and the tokens that it holds by now (0: as booked).

        For requests that take long on an engine which acknowledges nothing: renew well within the pool's
        `booking_lease_ms`, release at the end. Repeating is harmless. Returns how many there were: one that has ended,
        or whose engine has begun another life, is not booked again. Never raises for an absent Redis.
        """
        return perform(self._placing.renew(bookings), self._store.run)

    @contextmanager
    def booking(self, request_id: str, tokens: int) -> Iterator[Placement]:
        """Dispatch for the length of a send: released where the body raises, left to the engine where it does not."""
        placement = self.dispatch(request_id, tokens)
        try:
            yield placement
        except BaseException:
            self.release(request_id)
            raise

    def snapshot(self) -> PoolSnapshot:
        """The pool as it is now, addresses of its engines included; not for the hot path. Its loads are remembered."""
        return self._placing.learn(self._store.run(protocol.snapshot(self._placing.pool)))

    def close(self) -> None:
        """Close the connections."""
        self._store.close()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncDispatcher:
    """As `Dispatcher`, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._store = AsyncStore(settings)
        self._placing = _placing(settings)

    @classmethod
    def connect(cls, url: str | None = None, pool: str | None = None, **settings: str | int | None) -> AsyncDispatcher:
        """See `Dispatcher.connect`."""
        return cls(Settings.from_environment(None, url=url, pool=pool, **settings))

    @property
    def counters(self) -> Counters:
        """How many requests went which way."""
        return self._placing.counters

    @property
    def is_falling_back(self) -> bool:
        """Whether Redis is taken to be away."""
        return self._placing.breaker.is_open

    async def dispatch(
        self, request_id: str, tokens: int, among: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> Placement:
        """See `Dispatcher.dispatch`."""
        return _single(await self.dispatch_many([Request(request_id, tokens)], among, avoid))

    async def dispatch_many(
        self, requests: Iterable[Request], among: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> list[Placement | NoRank]:
        """See `Dispatcher.dispatch_many`."""
        scope = Scope(among, avoid) if among or avoid else ANYWHERE
        return await perform_async(self._placing.dispatch(list(requests), scope), self._store.run)

    async def release(self, *request_ids: str) -> int:
        """See `Dispatcher.release`."""
        return await perform_async(self._placing.release(request_ids), self._store.run)

    async def renew(self, *bookings: tuple[str, int]) -> int:
        """See `Dispatcher.renew`."""
        return await perform_async(self._placing.renew(bookings), self._store.run)

    @asynccontextmanager
    async def booking(self, request_id: str, tokens: int) -> AsyncIterator[Placement]:
        """See `Dispatcher.booking`."""
        placement = await self.dispatch(request_id, tokens)
        try:
            yield placement
        except BaseException:
            await self.release(request_id)
            raise

    async def snapshot(self) -> PoolSnapshot:
        """See `Dispatcher.snapshot`."""
        return self._placing.learn(await self._store.run(protocol.snapshot(self._placing.pool)))

    async def aclose(self) -> None:
        """Close the connections, for good: a dispatch that is under way ends by the fallback."""
        await self._store.aclose()

    async def __aenter__(self) -> AsyncDispatcher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _single(answers: Sequence[Placement | NoRank]) -> Placement:
    answer = answers[0]
    if isinstance(answer, NoRank):
        raise answer
    return answer
