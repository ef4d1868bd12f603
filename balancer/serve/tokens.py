"""How many tokens a prompt has: exact where the body carries ids, by the model's tokenizer where one is given, else
estimated from its length, by a ratio that the engine's own counts correct.

The estimate begins at 4 bytes of UTF-8 to a token and follows `usage.prompt_tokens` of the answers, so that it settles
on the model and the language at hand; how far off it was is a metric.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from balancer.errors import InvalidInput
from balancer.model import MAX_TOKENS
from balancer.serve.endpoints import Asked

FIRST_BYTES_PER_TOKEN = 4.0
_WEIGHT = 0.02
"""Of one answer in the ratio."""
_LEAST_RATIO, _MOST_RATIO = 0.5, 16.0
_LEAST_BYTES = 64
"""Shorter prompts teach nothing: the chat template outweighs them."""


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
    """Counts prompts. With a tokenizer it has one thread, so that the event loop never waits for a long prompt."""

    def __init__(self, tokenizer: str | None = None) -> None:
        self.estimate = Estimate()
        self._tokenizer: Any = _load(tokenizer) if tokenizer else None
        self._thread = ThreadPoolExecutor(1, "tokenizer") if self._tokenizer else None

    @property
    def is_exact(self) -> bool:
        """Whether texts are counted by a tokenizer."""
        return self._tokenizer is not None

    def count(self, asked: Asked) -> Counted:
        """The tokens of a prompt without a tokenizer."""
        size = sum(map(_size, asked.texts or ()))
        if not size and not asked.extra:
            return Counted(asked.ids * asked.copies, "ids")
        tokens = asked.ids + asked.extra + self.estimate.tokens(size)
        return Counted(tokens * asked.copies, "estimate", 0 if asked.ids or asked.copies > 1 else size)

    async def count_exactly(self, asked: Asked) -> Counted:
        """The same with one, in its thread."""
        if self._thread is None or not asked.texts:
            return self.count(asked)
        counted = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, asked.texts)
        return Counted((asked.ids + asked.extra + counted) * asked.copies, "tokenizer")

    def _encode(self, texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _load(where: str) -> Any:
    path = Path(where)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]

        return Tokenizer.from_file(str(path))
    except ImportError:
        raise InvalidInput("--tokenizer needs the package tokenizers: pip install tokenizers") from None
    except Exception as error:  # the package raises a bare Exception
        raise InvalidInput(f"--tokenizer {path} cannot be read: {error}") from None
