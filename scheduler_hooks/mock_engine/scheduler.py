"""The queues of one rank: who waits, who is prefilled, who decodes, and how many tokens the rank holds.

Pure: no sockets, no clock, no torch. `rank` feeds it what it saw at a step boundary (`receive`, `abort`),
then calls `step` once per step of the engine. The rules are SGLang's, simplified:

* Prefill first: while a waiting request can be admitted, the step is a prefill batch and decoding pauses.
* A prefill batch has `chunk_tokens` tokens at most. The one prompt that does not fit whole is cut, and goes
  on first in the next step; there is never a second one cut.
* First come, first served. A request is admitted when its prompt and its whole answer fit into the KV pool
  beside what the admitted ones may still need (SGLang with a new-token ratio of 1, hence without
  retraction).
* The prefill of a prompt's last token yields the first token of the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from scheduler_hooks.mock_engine.cost import StepWork

CHUNK_TOKENS = 8_192
"""SGLang's default `--chunked-prefill-size` on large GPUs, tokens per rank and step."""

KV_CAPACITY_TOKENS = 700_000
"""KV pool of one H200 rank: of 141 GB about 60 GB are weights and 30 GB buffers; the rest at 70,272 bytes a
token.
"""


class Rejected(ValueError):
    """The rank cannot take this request; the message says why."""


@dataclass(slots=True, eq=False)
class HeldRequest:
    """One request on this rank; all counts in tokens."""

    request_id: str
    input_tokens: int
    output_tokens: int
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    admitted: bool = False

    @property
    def holding_tokens(self) -> int:
        """What it adds to the rank's holding count: the whole prompt, prefilled or not, and its answer."""
        return self.input_tokens + self.generated_tokens

    @property
    def reserved_tokens(self) -> int:
        """The most KV tokens that it will ever occupy."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: its work, and the answers that grew.

    `tokens` maps a request id to the number of tokens generated so far, for each request that got one in
    this step; `finished` lists those among them that got their last one.
    """

    work: StepWork
    tokens: Mapping[str, int]
    finished: tuple[str, ...]


_IDLE = Step(StepWork(), MappingProxyType({}), ())


class RankScheduler:
    """Queues and KV pool of one rank."""

    def __init__(self, kv_capacity_tokens: int = KV_CAPACITY_TOKENS, chunk_tokens: int = CHUNK_TOKENS) -> None:
        if kv_capacity_tokens < 1 or chunk_tokens < 1:
            raise ValueError("kv_capacity_tokens and chunk_tokens must be at least 1")
        self._capacity_tokens = kv_capacity_tokens
        self._chunk_tokens = chunk_tokens
        self._held: dict[str, HeldRequest] = {}
        self._waiting: deque[HeldRequest] = deque()
        self._chunked: HeldRequest | None = None
        self._running: dict[str, HeldRequest] = {}
        self._holding_tokens = 0
        self._reserved_tokens = 0
        self._running_kv_tokens = 0

    @property
    def holding_tokens(self) -> int:
        """Tokens the rank holds: KV of running requests, whole prompts of the waiting and the cut one."""
        return self._holding_tokens

    @property
    def requests(self) -> int:
        """Requests the rank holds, running and waiting."""
        return len(self._held)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV pool now."""
        return self._running_kv_tokens + (self._chunked.prefilled_tokens if self._chunked else 0)

    def holding_tokens_of(self, request_id: str) -> int:
        """What this request adds to `holding_tokens` now; 0 when it has left or never came."""
        request = self._held.get(request_id)
        return request.holding_tokens if request else 0

    def holds(self, request_id: str) -> bool:
        """Whether the request is here, waiting or running."""
        return request_id in self._held

    def receive(self, request_id: str, input_tokens: int, output_tokens: int) -> None:
        """Queue a request (tokens >= 1); its prompt counts as held from now on.

        Raises `Rejected` for an id that is here already and for a request that the empty KV pool could not
        hold.
        """
        if request_id in self._held:
            raise Rejected("a request with this id is here already")
        request = HeldRequest(request_id, input_tokens, output_tokens)
        if request.reserved_tokens > self._capacity_tokens:
            raise Rejected(f"needs {request.reserved_tokens} KV tokens, the rank has {self._capacity_tokens}")
        self._held[request_id] = request
        self._waiting.append(request)
        self._holding_tokens += input_tokens

    def abort(self, request_id: str) -> bool:
        """Forget a request wherever it is; False when it is not here (any more)."""
        request = self._held.get(request_id)
        if request is None:
            return False
        if request_id in self._running:
            self._leave_running(request)
        elif request is self._chunked:
            self._chunked = None
            self._leave(request)
        else:
            self._waiting.remove(request)
            self._leave(request)
        return True

    def step(self) -> Step:
        """Run one step to its end: nobody sees the rank in between, so work and outcome come together."""
        batch, prefill_tokens = self._prefill_batch()
        if batch:
            return self._prefill(batch, prefill_tokens)
        return self._decode() if self._running else _IDLE

    def _prefill_batch(self) -> tuple[list[HeldRequest], int]:
        """Choose and advance the prompts of this step: the cut one, then waiting ones, within the chunk."""
        batch: list[HeldRequest] = []
        budget = self._chunk_tokens
        if self._chunked:
            batch.append(self._chunked)
            budget -= _advance(self._chunked, budget)
        while budget and self._waiting:
            request = self._waiting[0]
            if self._reserved_tokens + request.reserved_tokens > self._capacity_tokens:
                break
            self._waiting.popleft()
            request.admitted = True
            self._reserved_tokens += request.reserved_tokens
            batch.append(request)
            budget -= _advance(request, budget)
        return batch, self._chunk_tokens - budget

    def _prefill(self, batch: list[HeldRequest], prefill_tokens: int) -> Step:
        last = batch[-1]
        self._chunked = last if last.prefilled_tokens < last.input_tokens else None
        complete = batch[:-1] if self._chunked else batch
        for request in complete:
            self._running[request.request_id] = request
            self._running_kv_tokens += request.input_tokens
        tokens, finished = self._generate(complete)
        return Step(StepWork(prefill_tokens=prefill_tokens, requests=len(batch)), tokens, finished)

    def _decode(self) -> Step:
        work = StepWork(kv_tokens=self._running_kv_tokens, requests=len(self._running))
        tokens, finished = self._generate(list(self._running.values()))
        return Step(work, tokens, finished)

    def _generate(self, batch: list[HeldRequest]) -> tuple[dict[str, int], tuple[str, ...]]:
        """One more token for each request of `batch` (all running); those that are complete leave."""
        tokens: dict[str, int] = {}
        finished: list[HeldRequest] = []
        for request in batch:
            request.generated_tokens += 1
            tokens[request.request_id] = request.generated_tokens
            if request.generated_tokens == request.output_tokens:
                finished.append(request)
        self._holding_tokens += len(batch)
        self._running_kv_tokens += len(batch)
        for request in finished:
            self._leave_running(request)
        return tokens, tuple(request.request_id for request in finished)

    def _leave_running(self, request: HeldRequest) -> None:
        del self._running[request.request_id]
        self._running_kv_tokens -= request.holding_tokens
        self._leave(request)

    def _leave(self, request: HeldRequest) -> None:
        del self._held[request.request_id]
        self._holding_tokens -= request.holding_tokens
        if request.admitted:
            self._reserved_tokens -= request.reserved_tokens


def _advance(request: HeldRequest, budget_tokens: int) -> int:
    """Prefill up to `budget_tokens` more of the prompt; returns how many it was."""
    tokens = min(budget_tokens, request.input_tokens - request.prefilled_tokens)
    request.prefilled_tokens += tokens
    return tokens
