"""The seed's way of choosing a rank, for comparison: `minimum_tokens` of SGLang PR 7379, as released in sglang 0.5.1.

Re-made from the wheel's `srt/managers/utils.py` (DPBalanceMeta) and `data_parallel_controller.py`
(minimum_tokens_scheduler), step for step: a manager process keeps a Namespace with the tokens each rank holds and one
dict of ids in flight per rank; a dispatch takes the manager's lock, copies both out, adds the request to the rank with
the least sum, and copies the dicts back in. Left out: the 40 steps by which a report is late, and the send.

It has two states. As it is made, its lists and dicts are the manager's own, reached through proxies (`as_proxies`). The
first write puts plain ones in their place, which travel whole with every access: the state in which it then stays.
"""

from __future__ import annotations

import multiprocessing


class SeedBalancer:
    """One dispatcher's view of the manager, as SGLang's data parallel controller had it."""

    def __init__(self, ranks: int, in_flight: int = 0, tokens: int = 1_000) -> None:
        self._manager = multiprocessing.Manager()
        self._lock = self._manager.Lock()
        self._shared = self._manager.Namespace()
        self._next_id = in_flight
        self._ranks = ranks
        self._shared.local_tokens = [10_000 + rank for rank in range(ranks)]
        self._shared.in_flight = [dict.fromkeys(range(rank, in_flight, ranks), tokens) for rank in range(ranks)]

    def dispatch(self, tokens: int) -> int:
        """Choose a rank and add the request to its dict."""
        self._next_id += 1
        with self._lock:
            in_flight = [dict(ids) for ids in self._shared.in_flight]
            local_tokens = list(self._shared.local_tokens)
            totals = [held + sum(ids.values()) for held, ids in zip(local_tokens, in_flight, strict=True)]
            target = totals.index(min(totals))
            in_flight[target][self._next_id] = tokens
            self._shared.in_flight = in_flight
        return target

    def acknowledge(self, rank: int) -> None:
        """What TP rank 0 does later: the newest id on `rank` is no longer in flight."""
        with self._lock:
            in_flight = self._shared.in_flight
            in_flight[rank].popitem()
            self._shared.in_flight = in_flight

    def as_proxies(self) -> None:
        """Back to the state in which it is made: every rank's dict a proxy of its own, nothing in flight."""
        dicts = [self._manager.dict() for _ in range(self._ranks)]
        self._kept = self._manager.list(dicts), dicts, self._manager.list([10_000] * self._ranks)
        self._shared.in_flight, self._shared.local_tokens = self._kept[0], self._kept[2]

    def close(self) -> None:
        self._manager.shutdown()
