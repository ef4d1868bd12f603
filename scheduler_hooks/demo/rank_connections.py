"""Connections of one dispatcher to the ranks of mock engines, wherever the pool says that they are.

The addresses come from a snapshot of the pool, as a router would learn them; a connection is made when a request is
first placed on its rank, and again after it broke. In come placements, out comes how each request ended.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from balancer import AsyncDispatcher, BalancerError, Placement
from scheduler_hooks.mock_engine import MockEngineClient

_CONNECT_S = 2.0


class RankConnections:
    """One connection per rank, shared by all requests placed on it."""

    def __init__(self, dispatcher: AsyncDispatcher) -> None:
        self._dispatcher = dispatcher
        self._addresses: dict[str, tuple[str, int]] = {}
        self._clients: dict[str, asyncio.Task[MockEngineClient]] = {}
        self._followers: set[asyncio.Task[None]] = set()
        self._waiting: defaultdict[str, dict[str, asyncio.Future[str]]] = defaultdict(dict)

    async def send(self, placement: Placement, output_tokens: int) -> asyncio.Future[str]:
        """Send a placed request; the future says how it ended: finished, rejected or lost.

        Raises OSError where its rank cannot be reached.
        """
        request = placement.request
        client = await self._client(placement)
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[placement.rank][request.request_id] = ended
        client.send(0, request.request_id, request.tokens, output_tokens)
        return ended

    async def learn(self) -> None:
        """Where all ranks of the pool listen. Raises `BalancerError` where there is none to be seen."""
        snapshot = await self._dispatcher.snapshot()
        by_name = {engine.name: engine.address for engine in snapshot.engines if engine.address}
        for rank in (view.rank for view in snapshot.ranks):
            engine, _, index = rank.rpartition("/")
            if rank in by_name:  # it reports alone
                host, port = by_name[rank].rsplit(":", 1)
                self._addresses[rank] = host, int(port)
            elif engine in by_name:  # rank 0's, and the other ranks' ports follow
                host, port = by_name[engine].rsplit(":", 1)
                self._addresses[rank] = host, int(port) + int(index)

    async def close(self) -> None:
        """Hang up."""
        for follower in self._followers:
            follower.cancel()
        for opening in self._clients.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                await opening.result().close()

    async def _client(self, placement: Placement) -> MockEngineClient:
        rank = placement.rank
        if rank not in self._clients:
            self._clients[rank] = asyncio.create_task(self._open(placement))
        opening = self._clients[rank]
        try:
            return await asyncio.shield(opening)
        except (OSError, BalancerError) as error:
            self._addresses.pop(rank, None)
            if self._clients.get(rank) is opening:
                del self._clients[rank]
            raise OSError(f"{rank} cannot be reached: {error}") from error

    async def _open(self, placement: Placement) -> MockEngineClient:
        host, port = await self._address(placement)
        async with asyncio.timeout(_CONNECT_S):
            client = await MockEngineClient.connect([port], host)
        follower = asyncio.create_task(self._follow(placement.rank, client))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)
        return client

    async def _address(self, placement: Placement) -> tuple[str, int]:
        if placement.rank not in self._addresses:
            await self.learn()
        try:
            return self._addresses[placement.rank]
        except KeyError:
            raise OSError("the pool has no address of it") from None

    async def _follow(self, rank: str, client: MockEngineClient) -> None:
        async for _, event in client.events():
            for request_id in event.finished:
                self._end(rank, request_id, "finished")
            if event.error is not None and event.request_id is not None:
                self._end(rank, event.request_id, "rejected")
        self._clients.pop(rank, None)
        self._addresses.pop(rank, None)
        await client.close()
        for request_id in list(self._waiting[rank]):
            self._end(rank, request_id, "lost")

    def _end(self, rank: str, request_id: str, how: str) -> None:
        ended = self._waiting[rank].pop(request_id, None)
        if ended is not None and not ended.done():
            ended.set_result(how)
