"""The oracle: what a pool must hold, as a dict of engines, a dict of bookings, and sums over them.

It knows no Redis and no index: a load is added up when somebody asks. Where the pool is free to choose (a tie), the
oracle says what is allowed, is told what was chosen, and believes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from balancer.model import Incarnation, Scope
from balancer.protocol import ANYWHERE
from tests.property.rules import DECAY, ENVELOPES, Asked, Seen, wanted

DEFAULTS = {
    "policy": "envelope",
    "engine_lease_ms": "5000",
    "booking_lease_ms": "60000",
    "forget_ms": "3600000",
    "when_silent": "refuse",
    "when_full": "refuse",
    "slow_start_ms": "0",
    "weights": "equal",
}

MOST_TOKENS, MOST_REQUESTS = 10**10 - 1, 10**5
"""What the index of queues can tell apart."""


@dataclass(eq=False)
class Life:
    """An engine, or a rank that reports alone, between its join and its end."""

    who: Incarnation
    step: int
    lease_ends: int
    silent: bool = False
    draining: set[str] = field(default_factory=set)


@dataclass
class Booking:
    """A request in flight; it counts only while `life` is the one that its rank belongs to."""

    rank: str
    tokens: int
    life: Life
    deadline: int


class Oracle:
    """A pool, obviously."""

    def __init__(self) -> None:
        self.settings: dict[str, str] = {}
        self.lives: dict[str, Life] = {}
        self.life_of: dict[str, Life] = {}  # by rank
        self.held: dict[str, tuple[int, int]] = {}  # by rank: tokens, requests
        self.pressure: dict[str, str] = {}  # of ranks whose engine has told
        self.bookings: dict[str, Booking] = {}
        self.last_epoch = self.turn = self.expired = 0
        self.largest = 0.0  # prompt of late, in tokens

    # -- questions

    def ms(self, setting: str) -> int:
        return int(self.settings[setting])

    def is_booked(self, id_: str) -> bool:
        return id_ in self.bookings and self.counts(self.bookings[id_])

    def counts(self, booking: Booking) -> bool:
        return booking.life is self.life_of.get(booking.rank)

    def in_flight(self) -> tuple[Counter[str], Counter[str]]:
        """Tokens and requests in flight, by rank."""
        tokens, requests = Counter[str](), Counter[str]()
        for booking in self.bookings.values():
            if self.counts(booking):
                tokens[booking.rank] += booking.tokens
                requests[booking.rank] += 1
        return tokens, requests

    def loads(self, scope: Scope = ANYWHERE) -> dict[str, int]:
        """Every eligible rank within `scope`, with its load."""
        tokens, _ = self.in_flight()
        return {
            rank: self.held[rank][0] + tokens[rank]
            for rank, life in self.life_of.items()
            if not life.silent and rank not in life.draining and scope.allows(rank)
        }

    def queues(self) -> dict[str, tuple[int, int]]:
        """Load and requests of every eligible rank."""
        _, requests = self.in_flight()
        return {rank: (load, self.held[rank][1] + requests[rank]) for rank, load in self.loads().items()}

    def nobody_fresh(self, now: int) -> bool:
        return all(self.life_of[rank].lease_ends <= now for rank in self.loads())

    def why_none(self, scope: Scope, now: int) -> str:
        lives = [life for life in self.lives.values() if not scope.among or {*life.who.ranks} & {*scope.among}]
        if not lives:
            return "nobody_joined"
        return "all_silent" if all(life.silent or life.lease_ends <= now for life in lives) else "all_draining"

    def weight(self, rank: str, now: int) -> float:
        """What the operator has said of a rank or its engine, less while that has just joined."""
        told = self.settings["weights"].replace("equal", "")
        weights = {name: float(weight) for name, _, weight in (pair.partition("=") for pair in told.split(",") if pair)}
        who, slow_ms, share = self.life_of[rank].who, self.ms("slow_start_ms"), 1.0
        if slow_ms and now - self.last_epoch < slow_ms:
            share = min(1.0, max(0.1, (now - who.epoch) / slow_ms))
        return weights.get(rank, weights.get(who.engine, 1.0)) * share

    def ranks(self, scope: Scope, now: int) -> list[Seen]:
        """The ranks that may be chosen, the least loaded first and equals by name."""
        tokens, requests = self.in_flight()
        loads = sorted((load, rank) for rank, load in self.loads(scope).items())
        return [
            Seen(rank, load, self.held[rank][1] + requests[rank], tokens[rank], self.weight(rank, now))
            for load, rank in loads
        ]

    def allowed(self, tokens: int, scope: Scope, now: int) -> set[str]:
        """The ranks within `scope` on which the next request may be placed; empty where it fits on none."""
        policy, ranks = self.settings["policy"], self.ranks(scope, now)
        wants = wanted(policy, ranks, Asked(tokens, self.largest, self.settings))
        is_level = self.settings["weights"] == "equal" and all(self.weight(rank, now) == 1 for rank in self.life_of)
        if policy == "round_robin" and is_level:
            wants = {sorted(seen.rank for seen in ranks)[self.turn % len(ranks)]}
        if policy in ("envelope", "pending_envelope") and any(
            load > MOST_TOKENS or count > MOST_REQUESTS for load, count in self.queues().values()
        ):
            wants = {seen.rank for seen in ranks}  # the index of queues ends there
        limits = {seen.rank: self.life_of[seen.rank].who.capacity_tokens or 2**60 for seen in ranks}
        roomy = [seen.rank for seen in ranks if seen.load + tokens <= limits[seen.rank]]
        if roomy:
            return {rank if rank in roomy else roomy[0] for rank in wants}
        if self.settings["when_full"] == "least_loaded":
            return {seen.rank for seen in ranks if seen.load == ranks[0].load}
        return set()

    # -- changes

    def open(self) -> None:
        """Settings begin with the defaults; a pool that has lost them begins anew."""
        if not self.settings:
            self.settings = dict(DEFAULTS)
            self.lives, self.life_of, self.held, self.bookings = {}, {}, {}, {}
            self.pressure = {}

    def lose_settings(self) -> None:
        self.settings = {}
        self.last_epoch = self.turn = self.expired = 0
        self.largest = 0.0

    def overlapping(self, who: Incarnation) -> list[Life]:
        """The lives that have a rank in common with `who`, or its name."""
        return [
            life
            for life in self.lives.values()
            if life.who.name == who.name
            or (life.who.engine == who.engine and (life.who.index is None or who.index is None))
        ]

    def begin(self, who: Incarnation, step: int, now: int) -> Life:
        self.open()
        for life in self.overlapping(who):
            self.remove(life)
        life = self.lives[who.name] = Life(who, step, now + self.ms("engine_lease_ms"))
        self.life_of.update(dict.fromkeys(who.ranks, life))
        self.held.update(dict.fromkeys(who.ranks, (0, 0)))
        self.last_epoch = max(self.last_epoch, who.epoch)
        return life

    def remove(self, life: Life) -> None:
        del self.lives[life.who.name]
        for rank in life.who.ranks:
            del self.life_of[rank], self.held[rank]
            self.pressure.pop(rank, None)

    def ask(self, tokens: int) -> None:
        """A new request wants a rank: it takes its turn, and the largest prompt of late is known to be so large."""
        self.turn += self.settings["policy"] == "round_robin"
        if self.settings["policy"] in ENVELOPES:
            self.largest = max(tokens, self.largest * DECAY)

    def book(self, id_: str, rank: str, tokens: int, now: int) -> None:
        self.bookings[id_] = Booking(rank, tokens, self.life_of[rank], now + self.ms("booking_lease_ms"))

    def renew(self, id_: str, tokens: int, now: int) -> bool:
        if not self.settings or not self.is_booked(id_):
            return False
        booking = self.bookings[id_]
        booking.tokens, booking.deadline = tokens or booking.tokens, now + self.ms("booking_lease_ms")
        return True

    def end(self, ids: Iterable[str]) -> int:
        return sum(self.bookings.pop(id_, None) is not None for id_ in ids)

    def end_leases(self, now: int, most: int) -> None:
        """Time has passed: the silent are forgotten, the late fall silent, old bookings end."""
        for life in [life for life in self.lives.values() if life.lease_ends <= now and life.silent]:
            self.remove(life)
        late = [life for life in self.lives.values() if life.lease_ends <= now]
        if not (self.nobody_fresh(now) and self.settings.get("when_silent") == "last_known"):
            for life in late:
                life.silent, life.lease_ends = True, now + self.ms("forget_ms")
        due = sorted((b.deadline, id_) for id_, b in self.bookings.items() if b.deadline <= now)
        self.expired += self.end(id_ for _, id_ in due[:most])

    def recall(self, now: int) -> None:
        """With no fresh rank left, a pool may believe all that are silent once more."""
        if self.settings.get("when_silent") == "last_known" and self.nobody_fresh(now):
            for life in self.lives.values():
                if life.silent:
                    life.silent, life.lease_ends = False, now

    # -- what the keys must hold

    def state(self) -> dict[str, dict[str, object]]:
        tokens, requests = self.in_flight()
        limited = [life for life in self.lives.values() if life.who.capacity_tokens]
        return {
            "engines": {
                name: (
                    "silent" if life.silent else "up",
                    life.who.epoch,
                    life.step,
                    life.who.size,
                    frozenset(int(rank.partition("/")[2]) for rank in life.draining),
                )
                for name, life in self.lives.items()
            },
            "leases": {name: life.lease_ends for name, life in self.lives.items()},
            "loads": dict(self.loads()),
            "holding": {rank: held for rank, (held, _) in self.held.items()},
            "requests": {rank: queued for rank, (_, queued) in self.held.items()},
            "in_flight": {rank: tokens[rank] for rank in self.held},
            "in_flight_requests": {rank: requests[rank] for rank in self.held},
            "bookings": {id_: (b.rank, b.tokens) for id_, b in self.bookings.items()},
            "deadlines": {id_: b.deadline for id_, b in self.bookings.items()},
            "capacity": {rank: life.who.capacity_tokens for life in limited for rank in life.who.ranks},
            "pressure": self.pressure,
        }
