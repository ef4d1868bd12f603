"""Ranks that hold requests for a time and know exactly what they hold: for measuring how evenly routers spread.

Each rank is an address. A request of T prompt tokens (4 bytes of text each) is held for a fixed part and a part that
grows with T, and T counts as held meanwhile. `play` sends the same requests at the same moments, whatever stands
between, each to a replica drawn by the same seed, and samples what the ranks hold every 20 ms.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import statistics
import threading
from collections.abc import Sequence
from typing import Any

_SAMPLE_S = 0.02
_HEALTHY = json.dumps(
    {"status": "ok", "model_path": "tiny", "served_model_name": "tiny", "dp_size": 1, "is_generation": True,
     "object": "list", "data": [{"id": "tiny", "object": "model", "created": 1, "owned_by": "stub"}]}
).encode()  # fmt: skip


def _answer(tokens: int) -> bytes:
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    answer = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "tiny"}
    return json.dumps(answer | {"choices": [choice], "usage": usage}).encode()


def body_of(tokens: int, salt: int) -> bytes:
    """A chat completion whose prompt has about so many tokens, unlike any other."""
    text = f"{salt:08x} " + "lorem ipsum " * (tokens // 3 + 1)
    content = text[: max(4 * tokens, 9)]
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}).encode()


def status_of(port: int) -> int:
    """What a completion gets, 0 where nobody answers."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/v1/chat/completions", body_of(1, 0), {"Content-Type": "application/json"})
        status = connection.getresponse().status
        connection.close()
    except OSError:
        return 0
    return status


class Ranks:
    """Addresses that hold requests; the server and `play` share one event loop in a thread."""

    def __init__(self, ports: Sequence[int], base_s: float = 0.2, per_token_s: float = 0.002) -> None:
        self.ports = list(ports)
        self.held = [0] * len(self.ports)
        self._base_s, self._per_token_s = base_s, per_token_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._servers: list[asyncio.Server] = []

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def __enter__(self) -> Ranks:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def play(self, fronts: Sequence[int], seconds: float, rate: float, seed: int = 1) -> dict[str, float]:
        """Requests through `fronts`; the mean of max/mean held tokens over the samples of the last two thirds."""
        return asyncio.run_coroutine_threadsafe(self._play(fronts, seconds, rate, seed), self._loop).result(
            seconds + 120
        )

    async def _listen(self) -> None:
        for index, port in enumerate(self.ports):
            server = await asyncio.start_server(lambda r, w, index=index: self._serve(index, r, w), "127.0.0.1", port)
            self._servers.append(server)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                answer = _HEALTHY
                if head.startswith(b"post"):
                    tokens = len(json.loads(body)["messages"][0]["content"]) // 4
                    answer = _answer(tokens)
                    self.held[index] += tokens
                    try:
                        await asyncio.sleep(self._base_s + tokens * self._per_token_s)
                    finally:
                        self.held[index] -= tokens
                start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
                writer.write(start + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _play(self, fronts: Sequence[int], seconds: float, rate: float, seed: int) -> dict[str, float]:
        rng = random.Random(seed)
        loop = asyncio.get_running_loop()
        pools: dict[int, list[Any]] = {port: [] for port in fronts}
        ratios: list[float] = []
        failed = 0
        began = loop.time()

        async def ask(port: int, body: bytes) -> None:
            nonlocal failed
            try:
                reader, writer = pools[port].pop() if pools[port] else await asyncio.open_connection("127.0.0.1", port)
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0]))
                failed += b" 200 " not in answer[:16]
                pools[port].append((reader, writer))
            except (OSError, asyncio.IncompleteReadError, ValueError):
                failed += 1

        async def sample() -> None:
            while True:
                await asyncio.sleep(_SAMPLE_S)
                mean = statistics.fmean(self.held)
                if loop.time() - began > seconds / 3 and mean:
                    ratios.append(max(self.held) / mean)

        sampling = asyncio.create_task(sample())
        asked = []
        due = 0.0
        number = 0
        while due < seconds:
            due += rng.expovariate(rate)
            number += 1
            tokens = min(4000, max(8, int(rng.lognormvariate(5.8, 0.9))))
            front = fronts[int(rng.random() * len(fronts))]
            await asyncio.sleep(max(0.0, began + due - loop.time()))
            asked.append(asyncio.create_task(ask(front, body_of(tokens, number))))
        sampling.cancel()
        await asyncio.gather(*asked)
        for pool in pools.values():
            for _, writer in pool:
                writer.close()
        if failed:
            raise RuntimeError(f"{failed} of {number} requests failed")
        return {"max_over_mean": statistics.fmean(ratios), "requests": number, "samples": len(ratios)}
