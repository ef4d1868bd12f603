"""A small engine that answers, for a look and for tests: OpenAI's paths and /generate, streamed or not, small delays.

It computes nothing: the words of its answers count what it was asked. It obeys and reports the rank that it is told, as
SGLang and vLLM do.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import orjson

from balancer.serve.complaint import complaint
from balancer.serve.endpoints import PLACED
from balancer.serve.front import Client, Server
from balancer.serve.inbound import Inbound
from balancer.serve.options import Limits

_JSON = (b"Content-Type", b"application/json")
_WORDS = ("every", "rank", "steps", "together", "so", "the", "fullest", "sets", "the", "pace")
_MOST_TOKENS = 100_000
_LOOKS = (b"/v1/models", b"/health", b"/ready")


class MockEngine:
    """One address with `dp` ranks. `token_s`: delay per token; `first_s`: until the first one."""

    def __init__(self, dp: int = 1, first_s: float = 0.02, token_s: float = 0.005) -> None:
        self.dp, self.first_s, self.token_s = dp, first_s, token_s
        self.requests: list[tuple[str, bytes, list[tuple[bytes, bytes]], bytes]] = []
        """The last requests as they came: method, target, headers, body."""
        self.running = [0] * dp
        self.cancelled = 0
        self._server = Server(self._answer, Limits())

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound socket."""
        await self._server.start(sock)

    async def stop(self) -> None:
        """End."""
        await self._server.stop(0)

    async def _answer(self, client: Client, request: Inbound) -> None:
        self.requests = [*self.requests[-999:], (request.method, request.target, request.headers, request.body)]
        path = request.path
        if path not in (PLACED if request.method == "POST" else _LOOKS):
            return client.respond(request, 404, *complaint(404, "not a path of the mock engine", None, path))
        if request.method in ("GET", "HEAD"):
            models = {"object": "list", "data": [{"id": "mock", "object": "model", "owned_by": "dp-balancer"}]}
            return client.respond(
                request, 200, [_JSON], orjson.dumps(models if path == b"/v1/models" else {"status": "ok"})
            )
        try:
            fields = orjson.loads(request.body)
            rank = self._rank(request, fields)
        except (orjson.JSONDecodeError, ValueError, AttributeError) as error:
            return client.respond(request, 400, *complaint(400, str(error), None, path))
        self.running[rank] += 1
        try:
            await self._generate(client, request, fields, rank)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running[rank] -= 1

    def _rank(self, request: Inbound, fields: dict[str, Any]) -> int:
        told = request.header(b"x-data-parallel-rank")
        rank = int(told) if told is not None else fields.get("routed_dp_rank")
        if rank is None:
            return 0
        if not 0 <= rank < self.dp:
            raise ValueError(f"routed_dp_rank={rank} out of range [0, {self.dp})")
        return int(rank)

    async def _generate(self, client: Client, request: Inbound, fields: dict[str, Any], rank: int) -> None:
        path, count = request.path, _count(fields)
        prompt = max(1, len(request.body) // 4)
        if path == b"/v1/embeddings":
            data = {
                "object": "list",
                "data": [{"object": "embedding", "index": 0, "embedding": [0.0] * 8}],
                "model": "mock",
            }
            return client.respond(request, 200, [_JSON], orjson.dumps({**data, "usage": {"prompt_tokens": prompt}}))
        await asyncio.sleep(self.first_s)
        words = [_WORDS[at % len(_WORDS)] for at in range(count)]
        head = {"id": f"mock-{time.time_ns()}", "created": int(time.time()), "model": fields.get("model", "mock")}
        if not fields.get("stream"):
            await asyncio.sleep(self.token_s * count)
            return client.respond(request, 200, [_JSON], orjson.dumps(_whole(path, head, words, prompt, rank)))
        client.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for at, word in enumerate(words):
            if at:
                await asyncio.sleep(self.token_s)
            _event(client, _piece(path, head, word, rank, at))
        options = fields.get("stream_options")
        last = _piece(path, head, None, rank, count)
        if isinstance(options, dict) and options.get("include_usage"):
            _event(client, last)
            last = {**head, "object": last.get("object"), "choices": [], "usage": _usage(prompt, count)}
        _event(client, last)
        _chunk(client, b"data: [DONE]\n\n")
        client.write(b"0\r\n\r\n")
        return None


def _count(fields: dict[str, Any]) -> int:
    sampling = fields.get("sampling_params")
    asked = fields.get("max_completion_tokens") or fields.get("max_tokens") or fields.get("max_output_tokens")
    if isinstance(sampling, dict):
        asked = asked or sampling.get("max_new_tokens")
    return max(1, min(int(asked), _MOST_TOKENS)) if isinstance(asked, int) else 16


def _usage(prompt: int, count: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _whole(path: bytes, head: dict[str, Any], words: list[str], prompt: int, rank: int) -> dict[str, Any]:
    text, usage = " ".join(words), _usage(prompt, len(words))
    if path == b"/generate":
        return {"text": text, "meta_info": {"prompt_tokens": prompt, "completion_tokens": len(words), "dp_rank": rank}}
    if path == b"/v1/messages":
        said = [{"type": "text", "text": text}]
        usage = {"input_tokens": prompt, "output_tokens": len(words)}
        return {
            **head,
            "type": "message",
            "role": "assistant",
            "content": said,
            "stop_reason": "end_turn",
            "usage": usage,
        }
    if path == b"/v1/responses":
        content: list[dict[str, Any]] = [{"type": "output_text", "text": text, "annotations": []}]
        output = [{"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": content}]
        usage = {"input_tokens": prompt, "output_tokens": len(words), "total_tokens": prompt + len(words)}
        return {**head, "object": "response", "status": "completed", "output": output, "usage": usage}
    if path == b"/v1/completions":
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length"}
        return {**head, "object": "text_completion", "choices": [choice], "usage": usage}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def _piece(path: bytes, head: dict[str, Any], word: str | None, rank: int, at: int) -> dict[str, Any]:
    """A streamed token; None for the end."""
    text = "" if word is None else word if at == 0 else " " + word
    finish = "length" if word is None else None
    if path == b"/generate":
        return {"text": text, "meta_info": {"dp_rank": rank, "completion_tokens": at + 1, "finish_reason": finish}}
    if path == b"/v1/completions":
        return {**head, "object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    delta = {} if word is None else {"role": "assistant", "content": text} if at == 0 else {"content": text}
    return {
        **head,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def _event(client: Client, fields: dict[str, Any]) -> None:
    _chunk(client, b"data: " + orjson.dumps(fields) + b"\n\n")


def _chunk(client: Client, data: bytes) -> None:
    client.write(b"%x\r\n%b\r\n" % (len(data), data))
