"""A small asyncio client of the mock engine's ranks, for the demo and the tests.

One connection per rank carries all requests. It computes nothing: a `RankEvent`'s `t` and the caller's own
`time.monotonic()` at sending give time to first token, between tokens and to the end (times `speed`, if the
engine has one).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType

from scheduler_hooks.mock_engine.wire import RankEvent, abort_line, arrival_line, parse_event

_MAX_EVENT_BYTES = 64 * 1024 * 1024


class MockEngineClient:
    """Connections to all ranks of one mock engine: `await MockEngineClient.connect(rank_ports)`."""

    def __init__(self, streams: Sequence[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self._writers = [writer for _, writer in streams]
        self._events: asyncio.Queue[tuple[int, RankEvent | None]] = asyncio.Queue()
        self._readers = [asyncio.create_task(self._read(rank, reader)) for rank, (reader, _) in enumerate(streams)]

    @classmethod
    async def connect(cls, rank_ports: Sequence[int], host: str = "127.0.0.1") -> MockEngineClient:
        """Connect to every rank, in the order of the engine's `rank_ports`; raises OSError when one does not
        answer.
        """
        return cls([await asyncio.open_connection(host, port, limit=_MAX_EVENT_BYTES) for port in rank_ports])

    def send(self, rank: int, request_id: str, input_tokens: int, output_tokens: int) -> None:
        """Send a request to a rank, without waiting (lines are small and the rank reads at every step)."""
        self._writers[rank].write(arrival_line(request_id, input_tokens, output_tokens))

    def abort(self, rank: int, request_id: str) -> None:
        """Take a request back; an `aborted` event follows unless it had left already."""
        self._writers[rank].write(abort_line(request_id))

    async def events(self) -> AsyncIterator[tuple[int, RankEvent]]:
        """What the ranks say, as (rank, event), until a rank hangs up: an engine that lost one has ended."""
        while True:
            rank, event = await self._events.get()
            if event is None:
                return
            yield rank, event

    async def close(self) -> None:
        """Hang up; the ranks abort what is not finished."""
        for reader in self._readers:
            reader.cancel()
        for writer in self._writers:
            writer.close()
        for writer in self._writers:
            with suppress(OSError):
                await writer.wait_closed()

    async def __aenter__(self) -> MockEngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self, rank: int, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                self._events.put_nowait((rank, parse_event(line)))
        self._events.put_nowait((rank, None))
