"""From the times of single requests and steps to the figures that the demo shows. Pure arithmetic.

The names and their meaning are those of SGLang's and vLLM's serving benchmarks: TTFT is the time from a request's
arrival at the dispatcher to its first token, ITL the time between two tokens of one request, E2E that to its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Served:
    """One request from its arrival to its last token, in s of the host's monotonic clock; `rank` is the engine's."""

    request_id: str
    rank: int
    arrived_s: float
    dispatched_s: float
    first_token_s: float
    finished_s: float


@dataclass(slots=True)
class Times:
    """What was seen of a stream of requests; in ms and tokens, moments in s of the host's monotonic clock."""

    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    e2e_ms: list[float] = field(default_factory=list)
    dispatch_ms: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    first_s: float = float("inf")
    last_s: float = float("-inf")
    served: list[Served] = field(default_factory=list)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Times:
        """What another process has written down (`dataclasses.asdict`)."""
        return cls(**{**fields, "served": [Served(**one) for one in fields["served"]]})

    def add(self, other: Times) -> None:
        """Take in what another replica saw of the same stream, or of another one."""
        for name in ("ttft_ms", "itl_ms", "e2e_ms", "dispatch_ms", "served"):
            getattr(self, name).extend(getattr(other, name))
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.first_s, self.last_s = min(self.first_s, other.first_s), max(self.last_s, other.last_s)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ordered sequence lies, linear between neighbours."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(rounds: Sequence[Times], steps: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """The demo's figures by name, in the order in which they are shown; those of all rounds together.

    `steps` are the mock engine's step records. held_max_over_mean sums over them what the fullest rank holds and what
    a rank holds on average, and divides: steps in which hardly anything is held weigh as little as they cost.
    """
    times = Times()
    for stream in rounds:
        times.add(stream)
    found: dict[str, float] = {"requests": len(times.e2e_ms)}
    found["duration_s"] = sum(stream.last_s - stream.first_s for stream in rounds)
    found["input_tokens_per_s"] = times.input_tokens / found["duration_s"]
    found["output_tokens_per_s"] = times.output_tokens / found["duration_s"]
    for name, shares in _SHOWN.items():
        ordered = sorted(getattr(times, f"{name}_ms"))
        found[f"{name}_mean_ms"] = sum(ordered) / len(ordered)
        for share in shares:
            label = "median" if share == 0.5 else "max" if share == 1 else f"p{share * 100:.0f}"
            found[f"{name}_{label}_ms"] = percentile(ordered, share)
    fullest = mean = 0.0
    for step in steps:
        fullest += max(step["held"])
        mean += sum(step["held"]) / len(step["held"])
    found["held_max_over_mean"] = fullest / mean
    return found


_SHOWN = {
    "ttft": (0.5, 0.99),
    "itl": (0.5, 0.95, 0.99, 1.0),
    "e2e": (0.5, 0.99),
    "dispatch": (0.5, 0.99),
}
