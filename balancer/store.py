"""Performs operations on Redis, sync or async, within a time budget; with `connection` the only room that talks to it.

Nothing here knows what an operation means. The driver's own retries are off; tenacity retries what Redis did not answer
until the budget is spent, which every script allows (each may be repeated without harm). One attempt is a conversation
(`_conversation`): a generator that yields what to send to which node, so that the two stores differ by an `await`. Its
time is fixed when it begins, whatever it has to wait for: a name, a connection, a reply, a second node. Foreign
exceptions end here: callers see `balancer.errors` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

from redis import exceptions as driver
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from balancer.address import Node
from balancer.connection import async_clients, sync_clients, translated
from balancer.errors import BalancerError, StoreUnavailable
from balancer.protocol import Operation, Reply
from balancer.route import Route, route_to
from balancer.scripts import load_script
from balancer.settings import Settings

T = TypeVar("T")
Words = tuple[str | int, ...]
Conversation = Generator[tuple[Node, Words], Any, Any]

_FIRST_WAIT_S = 0.001
_LONGEST_WAIT_S = 0.05
_MOST_MOVES = 3
"""Redirections within one attempt; a fourth means that the cluster's nodes do not agree yet."""


class Store:
    """Performs operations with the sync driver; safe to share between threads and across fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clients = sync_clients(settings)
        self._route = route_to(settings.checked_address())

    def run(self, operation: Operation[T]) -> T:
        """Perform `operation` within the budget, the opening of a connection included.

        Raises `StoreUnavailable` when Redis does not answer in time, `StoreDenied`, or what the operation reads.
        """
        budget = _Budget(self.settings, operation.spent_s)
        try:
            return operation.read(self._evaluate(operation, budget))
        except StoreUnavailable:
            if budget.is_spent():
                raise
        again = Retrying(stop=budget, **_RETRY)
        return operation.read(again(self._evaluate, operation, budget))

    def command(self, *words: str | int) -> Any:
        """One plain command, for tools that look at the server itself (`balancer doctor`); no retry."""
        talk = _conversation(self._route, self.settings, lambda node: _say(node, words))
        return self._hold(talk, _Budget(self.settings).attempt_until_s())

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.made():
            client.close()

    def _evaluate(self, operation: Operation[Any], budget: _Budget) -> Reply:
        talk = _conversation(self._route, self.settings, lambda node: _evaluation(node, operation))
        return cast(Reply, self._hold(talk, budget.attempt_until_s()))

    def _hold(self, conversation: Conversation, until_s: float) -> Any:
        try:
            node, words = next(conversation)
            while True:
                try:
                    reply = self._clients.to(node).execute_command(*words, until_s=until_s)
                except (driver.RedisError, OSError) as error:
                    node, words = conversation.throw(error)
                else:
                    node, words = conversation.send(reply)
        except StopIteration as end:
            return end.value


class AsyncStore:
    """As `Store`, with an `await`; belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clients = async_clients(settings)
        self._route = route_to(settings.checked_address())

    async def run(self, operation: Operation[T]) -> T:
        """Perform `operation` within the budget; raises as `Store.run` does."""
        budget = _Budget(self.settings, operation.spent_s)
        try:
            return operation.read(await self._first(operation, budget))
        except StoreUnavailable:
            if budget.is_spent():
                raise
        again = AsyncRetrying(stop=budget, **_RETRY)
        return operation.read(await again(self._evaluate, operation, budget))

    async def _first(self, operation: Operation[Any], budget: _Budget) -> Reply:
        """The first attempt; where a connection is open there is nothing to prepare, and its patience ends the wait."""
        node = self._route.primary
        line = self._clients.to(node).line if node else None
        if not node or not line or operation.spent_s:
            return await self._evaluate(operation, budget)
        try:
            reply: Reply = await line.ask(*_by_sha(operation))
            return reply
        except OSError as error:
            raise _ours(error, self._route, self.settings, node) from error
        except driver.RedisError:  # asked again, the long way knows what to make of it
            return await self._evaluate(operation, budget)

    async def aclose(self) -> None:
        """Close all connections."""
        for client in self._clients.made():
            await client.aclose()

    async def _evaluate(self, operation: Operation[Any], budget: _Budget) -> Reply:
        talk = _conversation(self._route, self.settings, lambda node: _evaluation(node, operation))
        return cast(Reply, await self._hold(talk, budget.attempt_until_s()))

    async def _hold(self, conversation: Conversation, until_s: float) -> Any:
        try:
            node, words = next(conversation)
            while True:
                try:
                    reply = await self._clients.to(node).execute_command(*words, until_s=until_s)
                except (driver.RedisError, OSError) as error:
                    node, words = conversation.throw(error)
                else:
                    node, words = conversation.send(reply)
        except StopIteration as end:
            return end.value


def _conversation(route: Route, settings: Settings, talk: Callable[[Node], Conversation]) -> Conversation:
    """One attempt: find the primary, where it is not known, and `talk` to it; goes where a cluster redirects.

    Raises what `translated` makes of errors, and tells the route when a node did not serve.
    """
    for _ in range(1 + _MOST_MOVES):
        primary = route.primary
        node, question = (primary, ()) if primary else route.question()
        try:
            if primary:
                return (yield from talk(primary))
            route.answered((yield node, question))
        except driver.MovedError as moved:
            route.moved(Node(moved.host or node.host, moved.port))
        except (driver.RedisError, OSError) as error:
            raise _ours(error, route, settings, node) from error
    raise StoreUnavailable("the nodes of the cluster do not agree on who serves this pool")


def _ours(error: Exception, route: Route, settings: Settings, node: Node) -> BalancerError:
    """What callers see of an error; the route learns of a node that does not serve."""
    ours = translated(error, settings, node)
    if isinstance(ours, StoreUnavailable):
        route.lost(node)
    return ours


def _evaluation(node: Node, operation: Operation[Any]) -> Conversation:
    """The script by its SHA1, or whole where the node does not know it: a SCRIPT LOAD may reach another."""
    words = _by_sha(operation)
    try:
        return (yield node, words)
    except driver.NoScriptError:
        return (yield node, ("EVAL", load_script(operation.script).text, *words[2:]))


def _by_sha(operation: Operation[Any]) -> Words:
    keys = operation.keys
    return ("EVALSHA", load_script(operation.script).sha, len(keys), *keys, *operation.arguments)


def _say(node: Node, words: Words) -> Conversation:
    return (yield node, words)


class _Budget:
    """The time of one operation, of which `spent_s` has gone by; each of `tries` attempts has its share.

    Also tenacity's `stop`: no attempt begins that could not end within the budget.
    """

    def __init__(self, settings: Settings, spent_s: float = 0.0) -> None:
        budget_s = settings.budget_ms / 1000
        self._share_s = budget_s / settings.tries
        self._end = time.monotonic() + budget_s - spent_s

    def attempt_until_s(self) -> float:
        """When an attempt that begins now has had its share (monotonic clock)."""
        return min(time.monotonic() + self._share_s, self._end)

    def is_spent(self, after_s: float = 0.0) -> bool:
        return time.monotonic() + after_s >= self._end - self._share_s

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self.is_spent(after_s=retry_state.upcoming_sleep)


_RETRY: dict[str, Any] = {
    "wait": wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S),
    "retry": retry_if_exception_type(StoreUnavailable),
    "reraise": True,
}
