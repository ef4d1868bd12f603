"""The project's policies in Python: twins of `lua/policies`, for runs of many requests.

The shipped Lua decides; a twin only repeats it faster, and `tests/unit/test_simulator.py` holds the two together,
choice by choice. A twin sees the ranks in the order in which a sorted set with equal scores has them (by name), so that
ties fall alike. Each keeps what the Lua keeps in the pool's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

REQUEST_TOKENS = 1_500
"""KV tokens that cost a step as much as one request: the middle of 900 to 2,200 on H20 and H200 class hardware."""

TURNS = 1_000_000
"""A turn is the last six digits of an in-flight id: what decides between equals."""


@dataclass(slots=True)
class Loads:
    """What a policy sees of each rank, holding + in flight: tokens, requests, and prompt tokens not yet prefilled.

    The last is not in the project's reports; its policies know the tokens in flight alone.
    """

    tokens: list[int]
    requests: list[int]
    pending: list[int]
    in_flight: list[int] = field(default_factory=list)


class Policy(Protocol):
    """A rule that chooses ranks."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The rank for one request, which is then booked there."""


class RoundRobin:
    """Each rank in turn, blind to load."""

    def __init__(self, ranks: int) -> None:
        self._turn, self._ranks = 0, ranks

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The next rank."""
        self._turn += 1
        return self._turn % self._ranks


class MinimumTokens:
    """The least load in tokens; of equals the one whose turn it is."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The least loaded rank."""
        return one_of_least(loads.tokens, turn)


class MinimumRequests:
    """The fewest requests; of equals the one whose turn it is."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The rank with the shortest queue."""
        return one_of_least(loads.requests, turn)


class Random:
    """Any rank."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The rank whose turn it is, the least loaded counted first; in-flight ids are spread evenly."""
        return by_load(loads)[turn % len(loads.tokens)]


class PowerOfTwo:
    """Of two ranks drawn at random the one with fewer tokens."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The lesser of two."""
        ranks = len(loads.tokens)
        if ranks == 1:
            return 0
        one, step = turn % ranks, 1 + turn // ranks % (ranks - 1)
        order = by_load(loads)
        drawn = sorted((order[one], order[(one + step) % ranks]))
        return drawn[one_of_least([loads.tokens[rank] for rank in drawn], turn)]


class Envelope:
    """Fewest requests among ranks that stay within an envelope in tokens.

    The envelope is as high as the fullest rank (where `capped`), and at most `k` times the decayed largest prompt above
    the mean, so that a giant leaves the others room without a licence to pile up. Where nobody fits, the least tokens.
    """

    def __init__(self, k: float = 0.25, decay: float = 0.999, capped: bool = True) -> None:
        self._k, self._decay, self._capped, self._largest = k, decay, capped, 0.0

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The rank with the fewest requests within the envelope; of these the fullest."""
        self._largest = max(float(tokens), self._largest * self._decay)
        held, requests = loads.tokens, loads.requests
        ceiling = sum(held) / len(held) + self._k * self._largest
        room = (min(max(held), ceiling) if self._capped else ceiling) - tokens
        best, fewest, fullest = -1, 0, 0
        for rank, load in enumerate(held):
            if load <= room:
                count = requests[rank]
                if best < 0 or count < fewest or (count == fewest and load > fullest):
                    best, fewest, fullest = rank, count, load
        return best if best >= 0 else one_of_least(held, turn)


class CostEnvelope:
    """The envelope in what a rank costs, tokens and requests together, instead of tokens alone.

    `request_tokens` is the price of a request in tokens. Within the envelope, of the ranks with at most `slack`
    requests more than the fewest, the dearest: what is left low is kept for giants. Where nobody fits, the least cost.
    """

    def __init__(self, request_tokens: float = REQUEST_TOKENS, slack: int = 2) -> None:
        self._request_tokens, self._slack = request_tokens, slack
        self._k, self._decay, self._largest = 0.25, 0.999, 0.0

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The dearest of the ranks with room and few requests."""
        self._largest = max(float(tokens), self._largest * self._decay)
        price, requests = self._request_tokens, loads.requests
        costs = [held + price * count for held, count in zip(loads.tokens, requests, strict=True)]
        room = min(max(costs), sum(costs) / len(costs) + self._k * self._largest) - tokens - price
        fitting = [rank for rank, cost in enumerate(costs) if cost <= room]
        if not fitting:
            return one_of_least(costs, turn)
        most = min(requests[rank] for rank in fitting) + self._slack
        return max((rank for rank in fitting if requests[rank] <= most), key=costs.__getitem__)


class PendingEnvelope:
    """For unified engines: of the ranks with the least in flight, the one that an envelope without a cap chooses.

    What is in flight is prefill ahead that no report contains yet. A step lasts as long as its longest chunk of
    prefill, and dozens of decode steps of imbalance weigh less than one prompt that waits behind another while the next
    rank has none. For decode engines it is the wrong rule.
    """

    def __init__(self) -> None:
        self._envelope = Envelope(capped=False)

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The envelope's choice among the ranks with the fewest tokens in flight."""
        return self.choose_among(loads, loads.in_flight, tokens, turn)

    def choose_among(self, loads: Loads, ahead: Sequence[int], tokens: int, turn: int) -> int:
        """The envelope's choice among the ranks with the least of what is `ahead`."""
        least = min(ahead)
        ranks = [rank for rank, pending in enumerate(ahead) if pending == least]
        among = Loads(
            [loads.tokens[rank] for rank in ranks],
            [loads.requests[rank] for rank in ranks],
            [least] * len(ranks),
        )
        return ranks[self._envelope.choose(among, tokens, turn)]


def by_load(loads: Loads) -> list[int]:
    """The ranks, the least loaded first, as the index of loads has them."""
    return sorted(range(len(loads.tokens)), key=lambda rank: (loads.tokens[rank], rank))


def one_of_least(values: Sequence[float], turn: int) -> int:
    """The place of the least value; of equals the one whose turn it is."""
    least = min(values)
    equals = values.count(least)  # one pass in C; more than one is rare once the pool is busy
    if equals == 1:
        return values.index(least)
    places = [place for place, value in enumerate(values) if value == least]
    return places[turn % equals]


TWINS: Mapping[str, Callable[[int], Policy]] = {
    "round_robin": RoundRobin,
    "random": lambda ranks: Random(),
    "minimum_requests": lambda ranks: MinimumRequests(),
    "minimum_tokens": lambda ranks: MinimumTokens(),
    "power_of_two": lambda ranks: PowerOfTwo(),
    "envelope": lambda ranks: Envelope(),
    "cost_envelope": lambda ranks: CostEnvelope(),
    "pending_envelope": lambda ranks: PendingEnvelope(),
}
"""How a twin is made for a number of ranks, by the name of its policy."""
