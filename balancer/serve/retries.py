"""The retry budget: retries are a share of the requests, so that an outage is not answered by a storm. Pure."""

from __future__ import annotations


class RetryBudget:
    """Each request puts `share` of a retry in, each retry takes one out; `reserve` is there from the start."""

    def __init__(self, share: float, reserve: float = 10.0) -> None:
        self._share, self._most = share, reserve
        self._left = reserve

    def earn(self) -> None:
        """A request has come."""
        self._left = min(self._most, self._left + self._share)

    def spend(self) -> bool:
        """Whether a retry may be made now; if so it is counted."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
