"""Rules that beat `envelope` here and are not in `lua/policies` (yet); `NOTES.md` has their numbers and the others'.

As balancers they are called `trial:NAME`. A trial that becomes a policy moves to `policies` as the twin of its Lua.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from balancer.simulator.policies import Envelope, Loads, Policy, one_of_least

REQUEST_TOKENS = 1_500
"""KV tokens that cost a step as much as one request: the middle of 900 to 2,200 on H20 and H200 class hardware."""


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
    """For unified engines: of the ranks with the least prefill ahead of them, the one that the envelope chooses.

    A step lasts as long as its longest chunk of prefill, and dozens of decode steps of imbalance weigh less than one
    prompt that waits behind another while the next rank has none. For decode engines it is the wrong rule.
    """

    def __init__(self) -> None:
        self._envelope = Envelope()

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The envelope's choice among the ranks with the fewest tokens to prefill."""
        least = min(loads.pending)
        ranks = [rank for rank, pending in enumerate(loads.pending) if pending == least]
        among = Loads(
            [loads.tokens[rank] for rank in ranks],
            [loads.requests[rank] for rank in ranks],
            [least] * len(ranks),
        )
        return ranks[self._envelope.choose(among, tokens, turn)]


TRIALS: Mapping[str, Callable[[int], Policy]] = {
    "cost_envelope": lambda ranks: CostEnvelope(),
    "pending_envelope": lambda ranks: PendingEnvelope(),
}
"""How a trial is made for a number of ranks."""
