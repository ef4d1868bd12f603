"""What vLLM has registered when it sends a request, and must forget again when its client goes before it is sent.

`AsyncLLM.add_request` registers a request in its output processor, then sends it, and never gives up the event loop in
between: no cancellation and no abort can come there, so vLLM is prepared for none. The dispatcher inside waits for
Redis at that very place. So it looks, by what stands here, whether the request is still wanted after the wait.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

AddRequest = Callable[..., Awaitable[Any]]


class Registration:
    """One call of `AsyncLLM.add_request`: what its output processor knows of the requests that it sends.

    `is_aborted`: a request of this call has been aborted before it was sent (then its siblings, of n > 1, are too).
    """

    def __init__(self, processor: Any = None) -> None:
        self.is_aborted = False
        self._processor = processor

    def has(self, request_id: str) -> bool:
        """Whether vLLM has registered the request; False where nothing can be known."""
        return self._processor is not None and bool(self._processor.has_request(request_id))

    def forget(self, request_id: str) -> None:
        """Take back what vLLM has registered of a request that no EngineCore has seen."""
        self._processor.abort_requests([request_id], internal=True)


_now: ContextVar[Registration] = ContextVar("_dp_balancer_registration")


def registration() -> Registration:
    """That of the running `AsyncLLM.add_request`; outside of it one that knows nothing."""
    return _now.get(None) or Registration()


def registering(add_request: AddRequest) -> AddRequest:
    """`AsyncLLM.add_request` that says what it registers in."""

    @functools.wraps(add_request)
    async def wrapped(llm: Any, *args: Any, **kwargs: Any) -> Any:
        token = _now.set(Registration(getattr(llm, "output_processor", None)))
        try:
            return await add_request(llm, *args, **kwargs)
        finally:
            _now.reset(token)

    return wrapped
