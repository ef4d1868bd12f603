"""A clock that a test moves: the scripts read Redis' clock in one place, and here that place reads a key."""

from __future__ import annotations

from functools import cache

import redis

from balancer import scripts

CLOCK_KEY = "test:clock"
BEGINNING_MS = 1_790_000_000_000

_NOW_MS = f"local function now_ms() return tonumber(redis.call('GET', '{CLOCK_KEY}')) end"


@cache
def script_with_test_clock(name: str) -> scripts.Script:
    """The script `name` with the test's clock in place of Redis' own."""
    return scripts.compose(name, lambda part: _NOW_MS if part == "now_ms" else scripts.read_part(part))


class Clock:
    """Time stands still until a test moves it."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.now_ms = BEGINNING_MS
        self.move(0)

    def move(self, ms: int) -> None:
        self.now_ms += ms
        self._client.set(CLOCK_KEY, self.now_ms)
