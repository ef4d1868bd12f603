"""What each policy wants, said as plainly as it goes: the set of ranks that are as good as any other.

No index, no short way, no batch: one request, a list of ranks, sums and minima. `random` and `power_of_two` draw, so
any rank will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ENVELOPES = ("envelope", "cost_envelope", "pending_envelope")
"""Policies that remember the largest prompt of late."""
DECAY = 0.999


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank that may be chosen: held and in flight together, and of it what is in flight."""

    rank: str
    load: int
    requests: int
    in_flight: int
    weight: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's tokens, the largest prompt of late (it included), and the pool's settings."""

    tokens: int
    largest: float
    settings: Mapping[str, str]

    def reach(self, policy: str) -> float:
        return float(self.settings.get(f"{policy}.k", 0.25)) * self.largest


def wanted(policy: str, ranks: Sequence[Seen], asked: Asked) -> set[str]:
    """The ranks among which the policy is indifferent."""
    return {seen.rank for seen in RULES[policy](ranks, asked)} if policy in RULES else {seen.rank for seen in ranks}


def least(ranks: Sequence[Seen], cost: Callable[[Seen], float]) -> list[Seen]:
    lowest = min(map(cost, ranks))
    return [seen for seen in ranks if cost(seen) == lowest]


def minimum_tokens(ranks: Sequence[Seen], asked: Asked) -> list[Seen]:
    return least(ranks, lambda seen: (seen.load + asked.tokens) / seen.weight)


def minimum_requests(ranks: Sequence[Seen], asked: Asked) -> list[Seen]:
    return least(ranks, lambda seen: (seen.requests + 1) / seen.weight)


def envelope(ranks: Sequence[Seen], asked: Asked) -> list[Seen]:
    most = max(seen.load / seen.weight for seen in ranks)
    return within(ranks, asked, min(most, mean_load(ranks) + asked.reach("envelope")))


def mean_load(ranks: Sequence[Seen]) -> float:
    return sum(seen.load / seen.weight for seen in ranks) / len(ranks)


def within(ranks: Sequence[Seen], asked: Asked, ceiling: float) -> list[Seen]:
    fitting = [seen for seen in ranks if seen.load / seen.weight + asked.tokens / seen.weight <= ceiling]
    if fitting:
        shortest = least(fitting, lambda seen: seen.requests / seen.weight)
        return least(shortest, lambda seen: -seen.load / seen.weight)
    return minimum_tokens(ranks, asked)


def cost_envelope(ranks: Sequence[Seen], asked: Asked) -> list[Seen]:
    def cost(seen: Seen) -> float:
        return (seen.load + 1500 * seen.requests) / seen.weight

    costs = list(map(cost, ranks))
    ceiling = min(max(costs), sum(costs) / len(costs) + asked.reach("cost_envelope"))
    fitting = [seen for seen in ranks if cost(seen) + (asked.tokens + 1500) / seen.weight <= ceiling]
    if not fitting:
        return least(ranks, cost)
    most = min(seen.requests / seen.weight for seen in fitting) + 2
    return least([seen for seen in fitting if seen.requests / seen.weight <= most], lambda seen: -cost(seen))


def pending_envelope(ranks: Sequence[Seen], asked: Asked) -> list[Seen]:
    idle = least(ranks, lambda seen: seen.in_flight / seen.weight)
    return within(idle, asked, mean_load(idle) + asked.reach("pending_envelope"))


RULES: Mapping[str, Callable[[Sequence[Seen], Asked], list[Seen]]] = {
    "minimum_tokens": minimum_tokens,
    "minimum_requests": minimum_requests,
    "envelope": envelope,
    "cost_envelope": cost_envelope,
    "pending_envelope": pending_envelope,
}
