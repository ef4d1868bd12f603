"""The only room that talks to Redis: performs operations, sync or async, within a time budget.

Nothing here knows what an operation means. The driver's own retries are off; tenacity retries what Redis did not answer
until the budget is spent, which every script allows (each may be repeated without harm). Foreign exceptions end here:
callers see `balancer.errors` only.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import redis
import redis.asyncio
from redis import exceptions as driver
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from balancer.errors import CorruptPool, InvalidInput, StoreDenied, StoreError, StoreUnavailable
from balancer.protocol import Operation, Reply
from balancer.scripts import load_script
from balancer.settings import Settings, redacted

try:
    from redis.maint_notifications import MaintNotificationsConfig
except ImportError:  # redis-py before 7
    MaintNotificationsConfig = None  # type: ignore[assignment,misc]

T = TypeVar("T")

_FIRST_WAIT_S = 0.001
_LONGEST_WAIT_S = 0.05
_TRIES_PER_BUDGET = 4
"""A silent server may cost a connection's time-out; so many of them fit into one budget."""

_NOT_NOW = (
    "READONLY",
    "OOM ",
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "MISCONF",
    "NOREPLICAS",
    "BUSY ",
)
_NOT_OURS = ("WRONGTYPE", "CORRUPT", "is not an integer", "not a valid float", "attempt to")


class Store:
    """Performs operations with the sync driver; safe to share between threads and across fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._client = _client(redis.Redis, Retry(NoBackoff(), 0), settings)

    def run(self, operation: Operation[T]) -> T:
        """Perform `operation` within the budget.

        Raises `StoreUnavailable` when Redis does not answer in time, `StoreDenied`, or what the operation reads.
        """
        give_up = _Budget(self.settings.budget_ms)
        try:
            return operation.read(self._evaluate(operation))
        except StoreUnavailable:
            if give_up.is_spent():
                raise
        again = Retrying(stop=give_up, **_RETRY)
        return operation.read(again(self._evaluate, operation))

    def command(self, *words: str | int) -> Any:
        """One plain command, for tools that look at the server itself (`balancer doctor`); no retry."""
        try:
            return self._client.execute_command(*words)
        except (driver.RedisError, OSError) as error:
            raise _translated(error, self.settings) from error

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _evaluate(self, operation: Operation[Any]) -> Reply:
        script, call = load_script(operation.script), self._client.execute_command
        rest = (len(operation.keys), *operation.keys, *operation.arguments)
        try:
            try:
                return cast(Reply, call("EVALSHA", script.sha, *rest))
            except driver.NoScriptError:
                return cast(Reply, call("EVAL", script.text, *rest))
        except (driver.RedisError, OSError) as error:
            raise _translated(error, self.settings) from error


class AsyncStore:
    """Performs operations with the asyncio driver; belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._client = _client(redis.asyncio.Redis, AsyncRetry(NoBackoff(), 0), settings)

    async def run(self, operation: Operation[T]) -> T:
        """Perform `operation` within the budget; raises as `Store.run` does."""
        give_up = _Budget(self.settings.budget_ms)
        try:
            async with asyncio.timeout(self.settings.budget_ms / 1000):
                try:
                    return operation.read(await self._evaluate(operation))
                except StoreUnavailable:
                    if give_up.is_spent():
                        raise
                again = AsyncRetrying(stop=give_up, **_RETRY)
                return operation.read(await again(self._evaluate, operation))
        except TimeoutError as error:
            raise StoreUnavailable(_no_answer(self.settings)) from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _evaluate(self, operation: Operation[Any]) -> Reply:
        script = load_script(operation.script)
        call = cast(Callable[..., Awaitable[Reply]], self._client.execute_command)
        rest = (len(operation.keys), *operation.keys, *operation.arguments)
        try:
            try:
                return await call("EVALSHA", script.sha, *rest)
            except driver.NoScriptError:
                return await call("EVAL", script.text, *rest)
        except (driver.RedisError, OSError) as error:
            raise _translated(error, self.settings) from error


class _Budget:
    """tenacity's `stop`: no attempt begins that could not end within the budget."""

    def __init__(self, budget_ms: int) -> None:
        self._last_start = time.monotonic() + budget_ms / 1000 * (1 - 1 / _TRIES_PER_BUDGET)

    def is_spent(self) -> bool:
        return time.monotonic() >= self._last_start

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self.is_spent()


_RETRY: dict[str, Any] = {
    "wait": wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S),
    "retry": retry_if_exception_type(StoreUnavailable),
    "reraise": True,
}


def _client(kind: Any, retry: Any, settings: Settings) -> Any:
    if settings.url is None:
        raise InvalidInput("no Redis address: set DP_BALANCER_URL, or give one (redis://host:port/0)")
    timeout_s = settings.budget_ms / 1000 / _TRIES_PER_BUDGET
    options: dict[str, Any] = {
        "protocol": 2,
        "retry": retry,
        "socket_timeout": timeout_s,
        "socket_keepalive": True,
    }
    if not settings.url.startswith("unix://"):
        options["socket_connect_timeout"] = timeout_s
    if MaintNotificationsConfig is not None:  # off: its hand-shake costs a round trip, and it may stretch our time-outs
        options["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    for name in ("username", "password"):
        if value := getattr(settings, name):
            options[name] = value
    try:
        return kind.from_url(settings.url, **options)
    except ValueError as error:
        raise InvalidInput(f"Redis address {redacted(settings.url)!r}: {error}") from None


def _no_answer(settings: Settings) -> str:
    return f"no answer from Redis at {redacted(settings.url or '')} within {settings.budget_ms} ms"


def _translated(error: Exception, settings: Settings) -> StoreError | CorruptPool:
    text, where = str(error), f"Redis at {redacted(settings.url or '')}"
    if isinstance(error, driver.AuthenticationError | driver.AuthorizationError | driver.NoPermissionError):
        return StoreDenied(f"{where} refuses us: {text} (check user, password and ACL)")
    if (
        isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError)
        or "CERTIFICATE" in text
    ):
        return StoreDenied(f"{where}: certificate not accepted: {text}")
    if isinstance(error, driver.TimeoutError):
        return StoreUnavailable(_no_answer(settings))
    if isinstance(error, driver.ConnectionError | OSError) or any(word in text for word in _NOT_NOW):
        return StoreUnavailable(f"{where} is not available: {text}")
    if any(word in text for word in _NOT_OURS):
        return CorruptPool(
            f"a key of this pool in {where} holds something that dp-balancer did not write ({text}): "
            "look with redis-cli, delete it or choose another pool name"
        )
    return StoreError(f"{where}: {text}")
