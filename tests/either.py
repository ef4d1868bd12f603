"""Sync and async behave alike: a test written for the one runs for the other too."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Awaited:
    """An object of the asyncio kind, used as its sync twin: each call runs to its end on a loop of its own."""

    def __init__(self, inner: Any, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self._inner = inner
        self._runner = asyncio.Runner(loop_factory=loop)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(member):
            return member
        return lambda *arguments: self._runner.run(member(*arguments))

    @contextmanager
    def booking(self, request_id: str, tokens: int) -> Iterator[Any]:
        inside = self._inner.booking(request_id, tokens)
        placement = self._runner.run(inside.__aenter__())
        try:
            yield placement
        except BaseException as error:
            if not self._runner.run(inside.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._runner.run(inside.__aexit__(None, None, None))

    def close(self) -> None:
        self._runner.run(self._inner.aclose())
        self._runner.close()
