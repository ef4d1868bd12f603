"""What every scheduler class of vLLM gets: it acknowledges what it receives and reports what it holds.

The mix-in stands before whatever class vLLM would have used (plain, asynchronous, the user's own), changes no decision
and no answer of it, and cannot fail it: what goes wrong in here is logged once and counted.

A step's counts leave in `schedule`, once per step: they hold all that has happened until the device begins to compute,
and the publisher's thread then has the time in which Python waits for it. What comes last in a row of steps leaves when
it happens, in `update_from_output` or `finish_requests`, since no step may follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from scheduler_hooks.once import Once
from scheduler_hooks.plugin import harmless
from scheduler_hooks.vllm.counts import Counts, HeldRequest

log = logging.getLogger("scheduler_hooks.vllm")

NEEDED = ("add_request", "schedule", "update_from_output", "finish_requests", "_free_request")
"""Methods that a scheduler class must have for its counts to be kept."""

Begin = Callable[[Any], Counts]
"""Makes the counts of a scheduler that has just been made."""

_trouble = Once(log)


def reporting(scheduler_class: type, begin: Begin) -> type:
    """`scheduler_class` with the mix-in before it; the class itself where it lacks what is needed."""
    missing = [name for name in NEEDED if not hasattr(scheduler_class, name)]
    if missing:
        log.warning(
            "loads are not reported: scheduler %s has no %s", scheduler_class.__qualname__, ", no ".join(missing)
        )
        return scheduler_class
    if issubclass(scheduler_class, Reporting):
        return scheduler_class
    body = {"_dp_balancer_begin": staticmethod(begin), "__module__": scheduler_class.__module__}
    return type(f"Reporting{scheduler_class.__name__}", (Reporting, scheduler_class), body)


class Reporting:
    """The mix-in. Its names begin with `_dp_balancer`, so that they meet no others."""

    requests: dict[str, HeldRequest]
    _dp_balancer: Counts | None = None
    _dp_balancer_is_updating = False
    _dp_balancer_begin: Begin

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dp_balancer = harmless(_trouble, "the hook's beginning")(self._dp_balancer_begin)(self)

    def add_request(self, request: HeldRequest, *args: Any, **kwargs: Any) -> Any:
        """The acknowledgement: the request is the scheduler's, waiting or running."""
        is_new = request.request_id not in self.requests
        answer = super().add_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None:
            _received(self._dp_balancer, request, is_new)
            if _is_paused(self):
                _hand_over(self._dp_balancer)  # no step follows until it goes on
        return answer

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A step begins: hand over."""
        answer = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None:
            _scheduled(self._dp_balancer, answer)
            _hand_over(self._dp_balancer)
        return answer

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """A step ends: its tokens count; hand over where nothing is left to be scheduled."""
        self._dp_balancer_is_updating = True
        try:
            outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._dp_balancer_is_updating = False
        if self._dp_balancer is not None:
            _generated(self._dp_balancer, outputs)
            if not self._dp_balancer.requests:
                _hand_over(self._dp_balancer)
        return outputs

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Requests end from outside (client gone, server going down): hand over."""
        answer = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None and not self._dp_balancer_is_updating:
            _hand_over(self._dp_balancer)
        return answer

    def _free_request(self, request: HeldRequest, *args: Any, **kwargs: Any) -> Any:
        """Every end of a request comes by here, once."""
        tokens = request.num_tokens
        answer = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None:
            self._dp_balancer.finished(request, tokens)
        return answer

    def _preempt_request(self, request: HeldRequest, *args: Any, **kwargs: Any) -> Any:
        """A request loses its place: its tokens are ahead again."""
        answer = super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None:
            self._dp_balancer.changed([request.request_id])
        return answer

    def _update_request_as_session(self, session: HeldRequest, *args: Any, **kwargs: Any) -> Any:
        """A streaming-input session goes on: its last token goes, its next input comes."""
        before = session.num_tokens
        answer = super()._update_request_as_session(session, *args, **kwargs)  # type: ignore[misc]
        if self._dp_balancer is not None:
            self._dp_balancer.changed_by(session, session.num_tokens - before)
        return answer

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """The engine goes: its rank leaves the pool."""
        if self._dp_balancer is not None:
            _close(self._dp_balancer)
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]


def _is_paused(scheduler: Any) -> bool:
    """Whether vLLM's scheduler is paused; versions without a pause are not."""
    state = getattr(scheduler, "_pause_state", None)
    return state is not None and bool(state.value)


_received = harmless(_trouble, "an acknowledgement")(Counts.received)
_generated = harmless(_trouble, "counting a step")(lambda counts, outputs: counts.generated(outputs.values()))
_scheduled = harmless(_trouble, "counting what is pending")(
    lambda counts, planned: counts.changed([request.req_id for request in planned.scheduled_new_reqs])
)
_hand_over = harmless(_trouble, "handing a step over")(Counts.hand_over)
_close = harmless(_trouble, "leaving the pool")(Counts.close)
