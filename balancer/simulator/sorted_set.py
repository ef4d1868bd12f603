"""A Redis sorted set: members ordered by score, then by name."""

from __future__ import annotations

import math
from bisect import bisect_left, insort


class SortedSet:
    """Members with scores. Looking up is a dict's work; the order is kept in one sorted list."""

    def __init__(self) -> None:
        self._scores: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._scores)

    def score(self, member: str) -> float | None:
        """The member's score, None for a stranger."""
        return self._scores.get(member)

    def put(self, member: str, score: float) -> bool:
        """Set a member's score; True where the member is new."""
        before = self._scores.get(member)
        if before == score:
            return False
        if before is not None:
            del self._order[bisect_left(self._order, (before, member))]
        self._scores[member] = score
        insort(self._order, (score, member))
        return before is None

    def remove(self, member: str) -> bool:
        """Forget a member; False for a stranger."""
        before = self._scores.pop(member, None)
        if before is None:
            return False
        del self._order[bisect_left(self._order, (before, member))]
        return True

    def by_rank(self, first: int, last: int) -> list[tuple[float, str]]:
        """From the first to the last place, both included; negative ones count from the end."""
        size = len(self._order)
        first = max(0, first + size if first < 0 else first)
        last = last + size if last < 0 else last
        return self._order[first : last + 1]

    def by_score(self, least: float, most: float, above: bool = False, below: bool = False) -> list[tuple[float, str]]:
        """Scores from `least` to `most`, both included unless `above` or `below` exclude them."""
        low = self._after(least) if above else bisect_left(self._order, (least, ""))
        high = bisect_left(self._order, (most, "")) if below else self._after(most)
        return self._order[low:high]

    def _after(self, score: float) -> int:
        return bisect_left(self._order, (math.nextafter(score, math.inf), "")) if score < math.inf else len(self._order)
