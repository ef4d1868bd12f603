"""Pending tokens: what of a scheduler's held tokens no step has taken up yet, kept without looking at every request.

Those are the prompts that wait, and what is left of one that is computed in chunks. Only requests whose pending tokens
may have changed are looked at: a new one when a step first schedules it, and from then on at each step until its
last chunk is scheduled; a preempted one until it runs again. So a step costs what happened in it, however many wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

_RUNS, _WAITS_FOR_ITS_CLIENT = "RUNNING", "WAITING_FOR_STREAMING_REQ"
"""Names of vLLM's `RequestStatus`."""


class PendingRequest(Protocol):
    """What is read of vLLM's `Request`."""

    request_id: str
    status: Any
    num_computed_tokens: int
    is_prefill_chunk: bool

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        ...

    def is_finished(self) -> bool:
        """Whether it needs no more steps."""
        ...


def pending_tokens_of(request: PendingRequest) -> int:
    """Tokens of a request that no step has taken up yet: of its prompt, or after a preemption of all of it.

    0 for one that generates, whose next step computes what its last one has generated, for a session whose client has
    to speak next, and for one that is finished.
    """
    status = request.status.name
    generates = status == _RUNS and not request.is_prefill_chunk
    if generates or status == _WAITS_FOR_ITS_CLIENT or request.is_finished():
        return 0
    return max(0, request.num_tokens - request.num_computed_tokens)


class Pending:
    """The pending tokens of the requests `live`, by id.

    `fetches`: whether KV comes from elsewhere, and takes a waiting request's tokens up outside of steps; then all that
    wait are looked at.
    """

    def __init__(self, live: Mapping[str, PendingRequest], fetches: bool = False) -> None:
        self._live = live
        self._fetches = fetches
        self._tokens = 0
        self._by_id: dict[str, int] = {}
        self._changing: set[str] = set()

    def enters(self, request_id: str, tokens: int) -> None:
        """A new request waits with all its tokens."""
        self._by_id[request_id] = tokens
        self._tokens += tokens
        if self._fetches:
            self._changing.add(request_id)

    def changes(self, request_ids: Iterable[str]) -> None:
        """These are scheduled for the first time, have lost what was computed of them, or go on with more."""
        self._changing.update(request_ids)

    def leaves(self, request_id: str) -> None:
        """A request is finished."""
        self._changing.discard(request_id)
        self._tokens -= self._by_id.pop(request_id, 0)

    def now(self) -> int:
        """Pending tokens at this moment."""
        for request_id in list(self._changing):
            request = self._live.get(request_id)
            tokens = 0 if request is None else pending_tokens_of(request)
            self._tokens += tokens - self._by_id.pop(request_id, 0)
            if tokens:
                self._by_id[request_id] = tokens
            else:
                self._changing.discard(request_id)
        return self._tokens

    def recount(self) -> None:
        """Count from nothing; what had changed unnoticed is looked at from now on."""
        before = self._by_id
        self._by_id = {
            request.request_id: tokens for request in self._live.values() if (tokens := pending_tokens_of(request))
        }
        self._changing = {
            request_id
            for request_id, tokens in self._by_id.items()
            if request_id in self._changing or before.get(request_id) != tokens
        }
        self._tokens = sum(self._by_id.values())
