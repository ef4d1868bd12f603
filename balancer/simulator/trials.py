"""Rules that beat the policies here and are not in `lua/policies` (yet); `NOTES.md` has their numbers and the others'.

As balancers they are called `trial:NAME`. A trial that becomes a policy moves to `policies` as the twin of its Lua.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from balancer.simulator.policies import Loads, PendingEnvelope, Policy


class PrefillEnvelope(PendingEnvelope):
    """As `pending_envelope`, if reports told how many prompt tokens each rank has still to prefill."""

    def choose(self, loads: Loads, tokens: int, turn: int) -> int:
        """The envelope's choice among the ranks with the fewest tokens to prefill."""
        return self.choose_among(loads, loads.pending, tokens, turn)


TRIALS: Mapping[str, Callable[[int], Policy]] = {
    "prefill_envelope": lambda ranks: PrefillEnvelope(),
}
"""How a trial is made for a number of ranks."""
