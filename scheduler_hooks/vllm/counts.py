"""What a scheduler holds, counted as it changes: held tokens = the sum of num_tokens over its unfinished requests.

Counting anew is O(requests) at every step. Here a step costs what happened in it: a request adds its tokens when it is
added, the tokens that a step has generated are in the step's own outputs, and a request takes all of its own away when
it finishes. Preemption, rejected drafts and asynchronous placeholders change how many tokens are *computed*, not how
many are held (`pending` counts what is not). Every RECOUNT_EVERY steps the sum is made anew all the same: a scheduler
of the user's own may change a request in a way that nobody could know, and then the log says so and the count is right
again.

Knows vLLM's `Request` and `EngineCoreOutputs` by their attributes only, and imports nothing of vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from balancer.marker import received_ids
from scheduler_hooks.once import Once
from scheduler_hooks.step_hook import StepHook
from scheduler_hooks.vllm.pending import Pending, PendingRequest

log = logging.getLogger("scheduler_hooks.vllm")

RECOUNT_EVERY = 1_024
"""Steps between two counts from nothing, which take about 0.1 us per live request."""

MARK_IN_EXTRA_ARGS = "dp_balancer"
"""Key of `vllm_xargs` that carries a dispatcher's mark where an endpoint ignores X-Request-Id (/v1/responses)."""


class HeldRequest(PendingRequest, Protocol):
    """What is read of vLLM's `Request`."""

    request_id: str
    sampling_params: Any


def in_flight_ids_of(request: HeldRequest) -> tuple[int, ...]:
    """The in-flight ids under which dispatchers may have booked this request; see `received_ids`."""
    extra = getattr(request.sampling_params, "extra_args", None)
    mark = extra.get(MARK_IN_EXTRA_ARGS) if extra else None
    own = received_ids(request.request_id)
    if not isinstance(mark, str):
        return own
    return tuple(dict.fromkeys((received_ids(mark)[0], own[-1])))


class Counts:
    """One scheduler's held and pending tokens, its requests, and what it has received since it last said so.

    `live`: its unfinished requests by id. `kv_usage`: the share of its KV cache in use, 0 to 1; None where it cannot
    tell. `fetches`: whether KV comes to it from elsewhere, and takes a waiting request's tokens up outside of steps.
    """

    def __init__(
        self,
        live: Mapping[str, HeldRequest],
        hook: StepHook,
        kv_usage: Callable[[], float] | None = None,
        fetches: bool = False,
        recount_every: int = RECOUNT_EVERY,
    ) -> None:
        self.held_tokens = 0
        self.requests = 0
        self.trouble = Once(log)
        self._live = live
        self._hook = hook
        self._kv_usage = kv_usage
        self._pending: Pending | None = Pending(live, fetches)
        self._received: dict[int, int] = {}
        self._recount_every = recount_every
        self._until_recount = recount_every

    def received(self, request: HeldRequest, is_new: bool) -> None:
        """`request` has entered the scheduler; one that is not new continues a session (see `changed_by`)."""
        if is_new:
            tokens = request.num_tokens
            self.held_tokens += tokens
            self.requests += 1
            if self._pending is not None:
                self._pending.enters(request.request_id, tokens)
            first, *others = in_flight_ids_of(request)
            self._received.setdefault(first, tokens)
            for other in others:  # the same request, whose tokens count once
                self._received.setdefault(other, 0)

    def generated(self, outputs: Iterable[Any]) -> None:
        """A step's `EngineCoreOutputs`: every request that grew in it has one, with the tokens that it grew by."""
        for client in outputs:
            self.held_tokens += sum([len(output.new_token_ids) for output in client.outputs])

    def changed(self, request_ids: Iterable[str]) -> None:
        """These are scheduled for the first time, or have lost what was computed of them."""
        if self._pending is not None:
            self._pending.changes(request_ids)

    def changed_by(self, request: HeldRequest, tokens: int) -> None:
        """A live request grew or shrank by `tokens` outside of a step's outputs, and waits for a step."""
        self.held_tokens += tokens
        self.changed([request.request_id])

    def finished(self, request: HeldRequest, tokens: int) -> None:
        """A request of `tokens` is finished."""
        self.held_tokens -= tokens
        self.requests -= 1
        if self._pending is not None:
            self._pending.leaves(request.request_id)

    def hand_over(self) -> None:
        """Give the counts, and what was received, to the publisher."""
        self._until_recount -= 1
        is_due = self._until_recount <= 0
        if is_due:
            self.recount()
        received, self._received = self._received, {}
        pending_tokens, kv_permille = self._pending_tokens(anew=is_due), self._kv_permille()
        self._hook.after_step(self.held_tokens, self.requests, received, pending_tokens, kv_permille)

    def recount(self) -> None:
        """Count what is held from nothing."""
        self._until_recount = self._recount_every
        live = [request for request in self._live.values() if not request.is_finished()]
        held_tokens, requests = sum([request.num_tokens for request in live]), len(live)
        if (held_tokens, requests) != (self.held_tokens, self.requests):
            self.trouble.note(
                "recount",
                "counted %d tokens of %d requests where the scheduler holds %d of %d: corrected",
                self.held_tokens,
                self.requests,
                held_tokens,
                requests,
            )
            self.held_tokens, self.requests = held_tokens, requests

    def close(self) -> None:
        """Take the rank out of the pool."""
        self._hook.close()

    def _pending_tokens(self, anew: bool) -> int | None:
        if self._pending is None:
            return None
        try:
            if anew:
                self._pending.recount()
            return self._pending.now()
        except Exception as error:  # requests of another shape: what is held is reported all the same
            self._pending = None
            self.trouble.note("pending tokens", "pending tokens are not reported: %r", error)
            return None

    def _kv_permille(self) -> int | None:
        if self._kv_usage is None:
            return None
        try:
            return round(1_000 * self._kv_usage())
        except Exception as error:
            self._kv_usage = None
            self.trouble.note("KV usage", "KV usage is not reported: %r", error)
            return None
