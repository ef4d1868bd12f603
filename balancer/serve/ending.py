"""Ending tasks for certain. A cancellation can be lost: before Python 3.12 `asyncio.wait_for`, and what is built on it,
returns instead of raising where its result comes in the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.05


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` until they have ended; what they raise is nobody's."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
