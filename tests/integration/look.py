"""One atomic look at a pool's keys, and what must hold in it at every moment; the oracle of the tests in containers."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass

from balancer import BalancerError, Settings
from balancer.keys import KEY_NAMES, pool_keys
from balancer.store import Store

_LOOK = """
local all = {}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  if kind == 'zset' then all[i] = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  else all[i] = redis.call('HGETALL', key) end
end
all[#all + 1] = redis.call('TIME')[1]
return all
"""
_EVERY_S = 0.1


@dataclass(frozen=True)
class Look:
    """A pool's keys at one moment: hashes and sorted sets by name, as dicts of text."""

    keys: dict[str, dict[str, str]]
    now_s: int

    def numbers(self, name: str) -> dict[str, int]:
        """A hash or sorted set whose values are whole numbers."""
        return {field: int(float(value)) for field, value in self.keys[name].items()}

    @property
    def requests(self) -> int:
        """Requests held by the engines and in flight to them."""
        return sum(self.numbers("requests").values()) + sum(self.numbers("in_flight_requests").values())

    @property
    def bookings(self) -> int:
        return len(self.keys["bookings"])

    @property
    def expired(self) -> int:
        return int(self.keys["pool"].get("expired", 0))

    @property
    def is_empty(self) -> bool:
        """Nothing held, nothing in flight, no booking left."""
        counts = ("holding", "requests", "in_flight", "in_flight_requests")
        return not self.bookings and not any(value for name in counts for value in self.numbers(name).values())

    @property
    def is_idle(self) -> bool:
        """Empty, with ranks to place on."""
        return self.is_empty and bool(self.keys["loads"])

    @property
    def report_age_s(self) -> float:
        """Age of the oldest last report of an engine that is in the pool."""
        reported = [
            int(match[1])
            for match in map(re.compile(r"reported_ms=(\d+)").search, self.keys["engines"].values())
            if match
        ]
        return self.now_s - min(reported) / 1000 if reported else float("inf")

    @property
    def report_is_fresh(self) -> bool:
        """Whether every engine has reported within the last two heartbeats."""
        return self.report_age_s < 2

    def mistakes(self) -> list[str]:
        """What must never be: a negative count, a sum that is not its bookings', a load that is not its parts."""
        found = []
        holding, loads = self.numbers("holding"), self.numbers("loads")
        in_flight, in_flight_requests = self.numbers("in_flight"), self.numbers("in_flight_requests")
        for name in ("holding", "requests", "in_flight", "in_flight_requests"):
            found += [f"{name} of {rank} is {value}" for rank, value in self.numbers(name).items() if value < 0]
        tokens: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for record in self.keys["bookings"].values():
            rank, booked, life, _ = record.split(" ", 3)
            # Made in the life of its rank's engine that goes on: it counts.
            if int(life) >= self._life(rank):
                tokens[rank] += int(booked)
                count[rank] += 1
        for rank in holding:
            if (in_flight[rank], in_flight_requests[rank]) != (tokens[rank], count[rank]):
                found.append(f"{rank}: {in_flight[rank]} in flight, bookings say {tokens[rank]}")
            if rank in loads and loads[rank] != holding[rank] + in_flight[rank]:
                found.append(f"{rank}: load {loads[rank]} is not {holding[rank]} + {in_flight[rank]}")
        if self.keys["bookings"].keys() != self.keys["deadlines"].keys():
            found.append("bookings and deadlines are not the same ids")
        return found

    def _life(self, rank: str) -> float:
        engines = self.keys["engines"]
        record = engines.get(rank) or engines.get(rank.partition("/")[0]) or ""
        match = re.search(r" life=(\d+)", record) or re.search(r" epoch=(\d+)", record)
        return int(match[1]) if match else float("inf")


class Watch:
    """Looks at a pool all the time; what it saw that must never be is in `mistakes`."""

    def __init__(self, settings: Settings) -> None:
        self.looks = 0
        self.mistakes: list[str] = []
        self._store = Store(settings)
        self._pool = settings.pool
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look(self) -> Look:
        """One look; raises BalancerError while Redis is away."""
        keys = pool_keys(self._pool)
        *found, now_s = self._store.command("EVAL", _LOOK, len(keys), *keys)
        flat = {name: [word.decode() for word in words] for name, words in zip(KEY_NAMES, found, strict=True)}
        return Look({name: dict(zip(words[::2], words[1::2], strict=True)) for name, words in flat.items()}, int(now_s))

    def sees(self, what: str) -> bool:
        """Whether a property of a look holds now; False while Redis is away."""
        try:
            return bool(getattr(self.look(), what))
        except BalancerError:
            return False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._store.close()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            try:
                seen = self.look()
            except BalancerError:
                time.sleep(_EVERY_S)
                continue
            self.looks += 1
            self.mistakes += seen.mistakes()
