"""The dispatcher inside an API server: before vLLM's client sends a request to an EngineCore, the pool chooses which.

One EVAL on the API server's own event loop, with the id and the token count that the scheduler will see. Whenever the
pool has no answer (Redis away, nobody joined, a rank that this server cannot reach), vLLM's own balancer decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from balancer import AsyncDispatcher, BalancerError, Outcome, Placement, Settings
from scheduler_hooks.once import Once
from scheduler_hooks.plugin import harmless
from scheduler_hooks.vllm.registering import registration

log = logging.getLogger("scheduler_hooks.vllm")

Send = Callable[[Any, Any], Awaitable[None]]
Begin = Callable[[], "InsideDispatcher"]

_OURS = "_dp_balancer"
"""A client's attribute: its dispatcher, or None where that could not begin."""


class InsideDispatcher:
    """Places the requests of one API server on the ranks of its own engine. Belongs to one event loop.

    `counters` says how many requests were placed by the pool, and how many vLLM placed, by reason.
    """

    def __init__(self, settings: Settings, engine: str) -> None:
        self.counters: Counter[str] = Counter()
        self._dispatcher = AsyncDispatcher(settings)
        self._pool, self._engine = settings.pool, engine
        self._trouble = Once(log)
        self._in_background: set[asyncio.Task[Any]] = set()

    async def place(self, request_id: str, tokens: int, ranks: Sequence[int]) -> int | None:
        """Book the request; the position in `ranks` of the rank chosen, or None: then vLLM is to choose.

        `ranks`: the data-parallel indices that this client can send to. A caller that is cancelled leaves no booking.
        """
        # A task of its own: were the EVAL cancelled half-way, nobody could tell whether it has booked.
        among = [f"{self._engine}/{index}" for index in ranks]
        booking = self._spawn(self._dispatcher.dispatch(request_id, tokens, among))
        try:
            placement = await asyncio.shield(booking)
        except asyncio.CancelledError:
            booking.add_done_callback(lambda _: self.release(request_id))
            raise
        except BalancerError as error:
            self._leave_to_vllm("no rank", "pool %s gives no rank: %s", self._pool, error)
            return None
        return self._position(placement, ranks)

    def release(self, request_id: str) -> None:
        """End a booking, without waiting for it."""
        self._spawn(self._dispatcher.release(request_id))

    def give_back(self, request_id: str) -> None:
        """End a booking on a rank that has gone while the pool was asked; vLLM is to choose."""
        self.release(request_id)
        self._leave_to_vllm("rank gone", "pool %s chose a rank that this server no longer has", self._pool)

    async def aclose(self) -> None:
        """Wait for what runs in the background, and close the connections."""
        await asyncio.gather(*self._in_background, return_exceptions=True)
        await self._dispatcher.aclose()

    def _position(self, placement: Placement, ranks: Sequence[int]) -> int | None:
        if placement.outcome is Outcome.FALLBACK:
            self.counters["redis away"] += 1  # the dispatcher has said so in the log, once
            return None
        if placement.engine != self._engine or placement.index not in ranks:
            self.release(placement.request.request_id)
            self._leave_to_vllm(
                "foreign rank",
                "pool %s has this id booked on %s, which this server cannot reach: ids must differ between requests",
                self._pool,
                placement.rank,
            )
            return None
        self.counters["placed"] += 1
        return ranks.index(placement.index)

    def _leave_to_vllm(self, reason: str, message: str, *arguments: object) -> None:
        self.counters[reason] += 1
        self._trouble.note(reason, message + "; vLLM's own balancer decides", *arguments)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._in_background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._in_background.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it too; a release that failed is left to the lease


def prompt_tokens(request: Any) -> int:
    """Tokens of an `EngineCoreRequest`'s prompt, given as ids or as embeddings; at least 1."""
    prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    return max(1, len(prompt))


def is_ours_to_place(client: Any, request: Any) -> bool:
    """Whether the pool may choose: not for pooling, nor a session's next input, nor where the caller has chosen."""
    is_in_session = request.resumable or request.request_id in getattr(client, "streaming_reqs", ())
    return (
        request.data_parallel_rank is None
        and request.pooling_params is None
        and not is_in_session
        and request.request_id not in client.reqs_in_flight
    )


def dispatcher_of(client: Any, begin: Begin) -> InsideDispatcher | None:
    """The client's dispatcher, begun once; None for ever where that failed. Raises what `begin` raised, once."""
    own = client.__dict__
    if _OURS not in own:
        own[_OURS] = None
        own[_OURS] = begin()
    found: InsideDispatcher | None = own[_OURS]
    return found


def dispatching(send: Send, begin: Begin) -> Send:
    """`DPLBAsyncMPClient.add_request_async` with the pool's choice before it.

    `begin` makes a client's dispatcher, at its first request: that is when its event loop runs.
    """
    trouble = Once(log)

    async def add_request_async(client: Any, request: Any) -> None:
        registered, id_ = registration(), request.request_id
        is_registered = registered.has(id_)
        if registered.is_aborted and not is_registered:
            return None  # with its sibling, while the pool was asked for that one
        dispatcher: InsideDispatcher | None = None
        position: int | None = None
        try:
            if is_ours_to_place(client, request) and (dispatcher := dispatcher_of(client, begin)):
                position = await dispatcher.place(id_, prompt_tokens(request), client.engine_ranks_managed)
                if position is not None and position >= len(client.core_engines):
                    dispatcher.give_back(id_)
                    position = None
        except Exception as error:
            trouble.note("dispatch", "a dispatch failed, vLLM's own balancer decides: %r", error, level=logging.ERROR)
        except BaseException:
            if is_registered:
                harmless(trouble, "forgetting a request")(registered.forget)(id_)
            raise
        if is_registered and not registered.has(id_):
            registered.is_aborted = True
            if dispatcher is not None and position is not None:
                dispatcher.release(id_)
            return None
        if dispatcher is None or position is None:
            return await send(client, request)
        request.data_parallel_rank = position
        try:
            return await send(client, request)
        except BaseException:  # cancelled, too: it may never have left
            dispatcher.release(id_)
            raise

    return add_request_async
