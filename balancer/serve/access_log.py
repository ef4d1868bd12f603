"""One line of JSON for each request: who, where to, how many tokens, how long. Never a body, a prompt or a key."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import orjson

from balancer.model import Placement

log = logging.getLogger("balancer.access")


@dataclass(slots=True)
class Entry:
    """What is known of a request so far. Times are monotonic, in s; 0 where it has not come to that."""

    request_id: str
    method: str
    path: str
    began: float
    engine: str = ""
    rank: str = ""
    outcome: str = ""
    tokens: int = 0
    tokens_from: str = ""
    tries: int = 0
    status: int = 0
    placed: float = 0.0
    first_byte: float = 0.0
    sent_bytes: int = 0
    trace: str = ""
    ended: str = "whole"
    """`whole`, `client_gone`, `cut` (the engine broke off), `cut_by_us` (we stopped, or the client did not read),
    `refused` (by us), `defect` (of ours)."""

    def place(self, placement: Placement, engine: str) -> None:
        """It has just been decided where it goes."""
        self.placed = time.monotonic()
        self.rank, self.engine, self.outcome = placement.rank, engine, placement.outcome.value

    def write(self) -> None:
        """Write the line."""
        now = time.monotonic()
        fields: dict[str, object] = {
            "at": round(time.time(), 3),
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "ended": self.ended,
            "rank": self.rank,
            "engine": self.engine,
            "outcome": self.outcome,
            "prompt_tokens": self.tokens,
            "tokens_from": self.tokens_from,
            "tries": self.tries,
            "placed_ms": _ms(self.placed, self.began),
            "first_byte_ms": _ms(self.first_byte, self.began),
            "total_ms": _ms(now, self.began),
            "sent_bytes": self.sent_bytes,
        }
        if self.trace:
            fields["trace_id"] = self.trace
        log.info("%s", orjson.dumps(fields).decode())


def _ms(moment: float, since: float) -> float | None:
    return round((moment - since) * 1000, 2) if moment else None
