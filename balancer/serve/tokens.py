"""How many tokens a prompt has: exact where the body carries ids, by the model's tokenizer where one is given, else
estimated from its length, by a ratio that the engine's own counts correct.

The estimate begins at 4 bytes of UTF-8 to a token and follows `usage.prompt_tokens` of the answers, so that it settles
on the model and the language at hand; how far off it was is a metric.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from balancer.errors import InvalidInput
from balancer.model import MAX_TOKENS
from balancer.serve.endpoints import Asked, Malformed, check_width, read_body
from balancer.serve.inbound import Inbound

Read = TypeVar("Read")

FIRST_BYTES_PER_TOKEN = 4.0
_WEIGHT = 0.02
"""Of one answer in the ratio."""
_LEAST_RATIO, _MOST_RATIO = 0.5, 16.0
_LEAST_BYTES = 64
"""Shorter prompts teach nothing: the chat template outweighs them."""
_MOST_AT_ONCE = 128 * 1024
"""Larger bodies are read beside the event loop: at worst a body of this size would hold it up for some 20 ms."""


class Estimate:
    """Bytes per token, learned. Pure."""

    def __init__(self) -> None:
        self.bytes_per_token = FIRST_BYTES_PER_TOKEN

    def tokens(self, size: int) -> int:
        """Tokens of so many bytes."""
        return int(size / self.bytes_per_token) + 1 if size else 0

    def learn(self, size: int, tokens: int) -> None:
        """A prompt of `size` bytes had `tokens` by the engine's count."""
        if size >= _LEAST_BYTES and tokens > 0:
            ratio = min(_MOST_RATIO, max(_LEAST_RATIO, size / tokens))
            self.bytes_per_token += _WEIGHT * (ratio - self.bytes_per_token)


class Counted:
    """A prompt's tokens as booked (at least 1), and what they rest on: `ids`, `tokenizer` or `estimate`."""

    __slots__ = ("source", "text_bytes", "tokens")

    def __init__(self, tokens: int, source: str, text_bytes: int = 0) -> None:
        self.tokens = min(max(1, tokens), MAX_TOKENS)
        self.source = source
        self.text_bytes = text_bytes


class TokenCounter:
    """Reads bodies and counts their prompts.

    Large bodies, and all texts where there is a tokenizer, go to its one thread: the event loop does not wait for them,
    and only one of them at a time lies about in parts.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self.estimate = Estimate()
        self._tokenizer: Any = _load(tokenizer) if tokenizer else None
        self._thread = ThreadPoolExecutor(1, "reader")

    async def read(self, path: bytes, body: bytes) -> tuple[Asked, Counted]:
        """What a body for `path` asks for, and its tokens; the texts are let go. Raises `Malformed`."""
        if self._tokenizer is None:
            return await self.beside(body, lambda: self._read(path, body))
        asked = await self.beside(body, lambda: read_body(path, body))
        if not asked.texts:
            return asked, self.count(asked)
        counted = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, asked)
        asked.texts = None
        return asked, counted

    def of_compressed(self, path: bytes, request: Inbound) -> tuple[Asked, Counted] | None:
        """The same of a compressed body, by its size: it is not ours to unpack, the engine gets it as it is. None for
        one that can be read. Raises `Malformed`."""
        coding = request.header(b"content-encoding")
        if (not coding or coding.lower() == b"identity") and not request.header(b"x-body-compressed"):
            return None
        if path == b"/generate":  # takes its rank in the body alone, and the client's own would outdo ours
            raise Malformed("a compressed body cannot be told its rank: send it to /generate plain")
        return Asked(has_rid=True), self.of_size(len(request.body))

    def of_size(self, size: int) -> Counted:
        """The tokens of a body of which the size is known."""
        return Counted(self.estimate.tokens(size), "estimate")

    async def beside(self, body: bytes, read: Callable[[], Read]) -> Read:
        """What `read` makes of `body`: at once, or where that may take long in the thread. Raises `Malformed`."""
        if len(body) <= _MOST_AT_ONCE:
            return read()

        def checked() -> Read:
            check_width(body)
            return read()

        return await asyncio.get_running_loop().run_in_executor(self._thread, checked)

    def _read(self, path: bytes, body: bytes) -> tuple[Asked, Counted]:
        asked = read_body(path, body)
        counted = self.count(asked)
        asked.texts = None  # a stream may last for minutes
        return asked, counted

    def count(self, asked: Asked) -> Counted:
        """The tokens of a prompt without a tokenizer."""
        size = sum(map(_size, asked.texts or ()))
        if not size and not asked.extra:
            return Counted(asked.ids * asked.copies, "ids")
        tokens = asked.ids + asked.extra + self.estimate.tokens(size)
        return Counted(tokens * asked.copies, "estimate", 0 if asked.ids or asked.copies > 1 else size)

    def _encode(self, asked: Asked) -> Counted:
        """The same with one; raises `Malformed`."""
        try:
            encoded = self._tokenizer.encode_batch_fast(asked.texts, add_special_tokens=False)
        except TypeError:
            raise Malformed("a text of the body holds half a character") from None
        tokens = sum(len(encoding.ids) for encoding in encoded)
        return Counted((asked.ids + asked.extra + tokens) * asked.copies, "tokenizer")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _load(where: str) -> Any:
    path = Path(where)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except ImportError:
        raise InvalidInput("--tokenizer needs the package tokenizers: pip install 'dp-balancer[tokenizer]'") from None
    except Exception as error:  # the package raises a bare Exception
        raise InvalidInput(f"--tokenizer {path} cannot be read: {error}") from None
