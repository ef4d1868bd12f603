"""What is simulated: the engines, who dispatches to them, and how old their reports are when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from balancer.errors import InvalidInput
from balancer.simulator.profiles import H200, Profile

MAX_DISPATCHERS = 32


class EngineKind(StrEnum):
    """How an engine mixes prefill and decode.

    `decode`: the decode half of a disaggregated deployment, requests come with their KV. `prefill_first`: SGLang, a
    rank with a prompt to prefill does nothing else in that step. `mixed`: vLLM, a step decodes every running request
    and fills what is left of its token budget with prefill.
    """

    DECODE = "decode"
    PREFILL_FIRST = "prefill_first"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One deployment. Times in seconds, lengths in tokens."""

    ranks: int = 16
    """Ranks of each engine; they step together."""
    engines: int = 1
    """Engines of the pool; each has a barrier of its own."""
    kind: EngineKind = EngineKind.DECODE
    profile: Profile = H200
    dispatchers: int = 1
    shared: bool = True
    """Whether all dispatchers see all bookings. Private: each sees the reports and its own bookings only."""
    report_age_s: float = 0.0
    """How old a report is when a dispatcher can read it."""
    acknowledgement_age_s: float = 0.0
    """The same for received ids; they travel in reports, so never less than `report_age_s`."""
    report_every: int = 1
    """Steps from one report to the next."""
    send_s: float = 0.0
    """The way of a request from its dispatcher to the rank."""
    list_size: int = 1
    """Most requests of one moment that a dispatcher places as one list."""
    chunk_tokens: int = 8_192
    """Prefill tokens of a rank in one step; mixed engines count decoded tokens in. SGLang's and vLLM's default on
    large GPUs."""
    max_running: int = 1_024
    """Most requests that a rank runs at once; vLLM's default on large GPUs."""
    warm_up: float = 0.0
    """Share of the requests, from the first, that is not measured."""
    cool_down: float = 0.0
    """The same from the last."""

    def __post_init__(self) -> None:
        for name in ("ranks", "engines", "report_every", "list_size", "chunk_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.dispatchers <= MAX_DISPATCHERS:
            raise InvalidInput(f"dispatchers must be 1 to {MAX_DISPATCHERS}, not {self.dispatchers}")
        for name in ("report_age_s", "acknowledgement_age_s", "send_s"):
            if not 0 <= getattr(self, name) <= 3600:
                raise InvalidInput(f"{name} must be between 0 and 3600 seconds, not {getattr(self, name)}")
        if self.warm_up < 0 or self.cool_down < 0 or self.warm_up + self.cool_down >= 1:
            raise InvalidInput("warm_up and cool_down are shares of the requests and leave some to measure")
        if self.kind is EngineKind.MIXED and self.chunk_tokens <= self.max_running:
            raise InvalidInput("a mixed step needs chunk_tokens above max_running, or nothing is ever prefilled")

    @property
    def all_ranks(self) -> int:
        """Ranks of the pool."""
        return self.ranks * self.engines
