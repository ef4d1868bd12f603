"""A program: random steps of dispatchers, engines, operators and time on one pool, each checked against the oracle.

Every choice is one number below a limit, drawn from `below`: hypothesis draws it to shrink what fails, the soak from a
seeded generator to run a million steps. After each step all keys must hold exactly what the oracle says.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson

from balancer import protocol, scripts
from balancer.errors import Fenced, InvalidInput, NoRankReason, WrongSize
from balancer.keys import KEY_NAMES, pool_keys
from balancer.model import Incarnation, Outcome, Placement, RankCounts, Report, Reported, Request, Scope, in_flight_id
from balancer.policies import policies
from balancer.protocol import Operation
from tests.clock import BEGINNING_MS, CLOCK_KEY, script_with_test_clock
from tests.property.oracle import MOST_REQUESTS, MOST_TOKENS, Oracle
from tests.property.wire import Wire

T = TypeVar("T")

POOL = "property"
ENGINE_LEASE_MS, BOOKING_LEASE_MS, FORGET_MS = 5_000, 60_000, 3_600_000
_DUMP = """
local all, ttls = {}, {}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  all[i] = kind == 'hash' and redis.call('HGETALL', key)
    or kind == 'zset' and redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') or {}
  ttls[i] = redis.call('PTTL', key)
end
return cjson.encode({all, ttls})
"""


class Program:
    """One pool, its oracle, and everybody who acts on it."""

    def __init__(self, wire: Wire, below: Callable[[int], int]) -> None:
        self.wire, self.below = wire, below
        self.weather = self.pick((ROUGH, CALM))
        self.oracle = Oracle()
        self.known: list[Incarnation] = []  # every life so far, the dead included
        self.steps_of: dict[str, int] = {}  # by nonce: the last step reported
        self.log: list[str] = []
        self.operations = 0
        wire.ask("FLUSHALL")
        for name in scripts.script_names():
            wire.ask("SCRIPT", "LOAD", script_with_test_clock(name).text)
        self._dump = ("EVALSHA", wire.ask("SCRIPT", "LOAD", _DUMP), len(KEY_NAMES), *pool_keys(POOL))
        self.set_clock(BEGINNING_MS)

    # -- drawing and performing

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def request_id(self) -> str:
        return f"r{self.below(self.weather.request_ids)}"

    def step(self) -> None:
        """One random step, now and then repeated at once: every write may be."""
        act = self.pick(self.weather.acts)
        again = act(self)
        if again and not self.below(4):
            self.log.append("  again")
            again()

    def run(self, operation: Operation[T], expected: type[Exception] | None = None) -> T | None:
        """Perform one operation; `expected` is the refusal that the oracle foresees."""
        self.operations += 1
        script = script_with_test_clock(operation.script)
        evaluate = ("EVALSHA", script.sha, len(operation.keys), *operation.keys, *operation.arguments)
        self.wire.send(evaluate, self._dump)
        reply, self._dumped = self.wire.read(), self.wire.read()
        if expected:
            try:
                answer: Any = operation.read(reply)
            except expected:
                return None
            raise AssertionError(f"{answer} where the oracle says {expected.__name__}")
        return operation.read(reply)

    def check(self) -> None:
        """The keys hold what the oracle says, and all but the settings end some day."""
        found, ttls = self.contents()
        pool, queues = found.pop("pool"), found.pop("queues")
        found["engines"] = {name: _engine(name, record) for name, record in found["engines"].items()}
        found["bookings"] = {id_: _booking(record) for id_, record in found["bookings"].items()}
        for name in set(found) - {"engines", "bookings", "pressure"}:
            found[name] = {field: int(value) for field, value in found[name].items()}
        for name, expected in self.oracle.state().items():
            assert found[name] == expected, f"{name}: {found[name]}, the oracle says {expected}"
        if self.oracle.settings:
            self._check_queues(pool, {rank: int(score) for rank, score in queues.items()})
        assert {name: pool.get(name) for name in self.oracle.settings} == self.oracle.settings
        assert int(pool.get("expired", 0)) == self.oracle.expired
        assert int(pool.get("turn", 0)) == self.oracle.turn
        assert float(pool.get("largest", 0)) == self.oracle.largest
        for name, ttl in zip(KEY_NAMES, ttls, strict=True):
            assert ttl > 0 or ttl == -2 or (name == "pool" and ttl == -1), f"{name} never ends"

    def contents(self) -> tuple[dict[str, dict[str, Any]], list[int]]:
        """What every key held after the last operation, and how long each had to live (ms)."""
        contents, ttls = orjson.loads(self._dumped)
        found = {
            name: dict(zip(flat[::2], flat[1::2], strict=True)) if flat else {}
            for name, flat in zip(KEY_NAMES, contents, strict=True)
        }
        return found, ttls

    def _check_queues(self, pool: dict[str, str], queues: dict[str, int]) -> None:
        """The index that is there only where the policy wants it, and its sums."""
        told = self.oracle.queues() if "queue_sums" in pool else {}
        pending, _ = self.oracle.in_flight() if pool["policy"] == "pending_envelope" else ({}, None)
        waiting = {rank: 2 * 10**15 + pending[rank] for rank in told if pending.get(rank)}
        counts = {
            rank: (min(load, MOST_TOKENS), min(count, MOST_REQUESTS))
            for rank, (load, count) in told.items()
            if rank not in waiting
        }
        assert queues == waiting | {rank: count * 10**10 - load for rank, (load, count) in counts.items()}
        if told:
            sums = (sum(load for load, _ in counts.values()), sum(count for _, count in counts.values()), len(counts))
            *known, fewest = map(int, pool["queue_sums"].split(" "))
            assert tuple(known) == sums
            assert all(fewest <= count for _, count in counts.values())

    def set_clock(self, now_ms: int) -> None:
        self.now = now_ms
        self.wire.ask("SET", CLOCK_KEY, now_ms)

    # -- acts: each returns how to do the very same again, or None

    def dispatch(self) -> Callable[[], None]:
        count = self.pick(self.weather.list_lengths)
        requests = [Request(self.request_id(), self.pick(self.weather.tokens)) for _ in range(count)]
        want_loads, name = not self.below(self.weather.loads_wanted_one_in), f"d{self.below(3)}"
        scope = self.scope() if not self.below(self.weather.restricted_one_in) else protocol.ANYWHERE

        def act() -> None:
            self.log.append(f"{name} dispatches {[(r.request_id, r.tokens) for r in requests]} {scope}")
            answer = self.run(protocol.dispatch(POOL, name, requests, want_loads, scope))
            assert answer
            if not self.oracle.settings:
                assert set(answer.outcomes) == {NoRankReason.NOBODY_JOINED}
                return self.check()
            self.oracle.end_leases(self.now, 16 + len(requests))
            self.oracle.recall(self.now)
            is_stale = self.oracle.nobody_fresh(self.now) and bool(self.oracle.loads())
            seen: dict[str, str] = {}
            for request, outcome in _in_order_of_placing(requests, answer.outcomes):
                self._check_outcome(name, request, outcome, seen, scope)
                assert not isinstance(outcome, Placement) or outcome.stale == is_stale
            assert answer.loads == (self.oracle.loads() if want_loads else None)
            self.check()

        act()
        return act

    def _check_outcome(
        self,
        name: str,
        request: Request,
        outcome: Placement | NoRankReason,
        seen: dict[str, str],
        scope: Scope,
    ) -> None:
        oracle, id_ = self.oracle, str(request.in_flight_id)
        if oracle.is_booked(id_):
            booking = oracle.bookings[id_]
            assert isinstance(outcome, Placement), f"{request.request_id} is booked, but: {outcome}"
            assert (outcome.outcome, outcome.rank) == (Outcome.REPEATED, booking.rank)
            booking.deadline = self.now + oracle.ms("booking_lease_ms")
        elif id_ in seen:
            assert outcome == seen[id_], f"{request.request_id} was {seen[id_]} in the same list"
        elif not oracle.loads(scope):
            assert outcome == oracle.why_none(scope, self.now)
            seen[id_] = outcome
        else:
            oracle.ask(request.tokens)
            allowed = oracle.allowed(request.tokens, scope, self.now)
            if not allowed:
                assert outcome == NoRankReason.ALL_FULL
                seen[id_] = outcome
                return
            assert isinstance(outcome, Placement), f"{request.request_id}: {outcome}, allowed are {allowed}"
            assert outcome.outcome is Outcome.PLACED
            assert outcome.rank in allowed, f"{name} got {outcome.rank}, allowed are {allowed}"
            assert outcome.load_tokens == oracle.loads()[outcome.rank]
            oracle.book(id_, outcome.rank, request.tokens, self.now)

    def release(self) -> Callable[[], None]:
        names = [self.request_id() for _ in range(self.pick((1, 1, 3)))]

        def act() -> None:
            self.log.append(f"release {names}")
            ended = self.run(protocol.release(POOL, names))
            assert ended == self.oracle.end(str(in_flight_id(name)) for name in names)
            self.check()

        act()
        return act

    def scope(self) -> Scope:
        """Ranks to choose among: any, or all, some or a few by name; and ranks to avoid. Not all of them are there."""
        known = [*dict.fromkeys(rank for who in self.known for rank in who.ranks), "stranger/0"]
        everyone = [*reversed(known), self.pick(known)]  # in an order that no index has, one of them twice
        among = self.pick(((), everyone, self.some(known), [self.pick(known), self.pick(known)]))
        return Scope(among, self.some(known) if not self.below(4) else ())

    def some(self, ranks: Sequence[str]) -> list[str]:
        return [rank for rank in ranks if self.below(2)]

    def renew(self) -> Callable[[], None]:
        count = self.pick((1, 1, 3))
        bookings = {self.request_id(): self.pick((0, *self.weather.tokens)) for _ in range(count)}

        def act() -> None:
            self.log.append(f"renew {bookings}")
            renewed = self.run(protocol.renew(POOL, [*bookings.items()]))
            assert renewed == sum(
                self.oracle.renew(str(in_flight_id(name)), tokens, self.now) for name, tokens in bookings.items()
            )
            self.check()

        act()
        return act

    def join(self) -> Callable[[], None]:
        engine, nonce, capacity = self.pick("abc"), f"n{len(self.known)}", self.pick(self.weather.capacities)
        index = self.below(4) if self.below(3) == 0 else None
        size = 1 if index is not None else 1 + self.below(4)
        who = Incarnation(engine, size, nonce, index, f"host-{engine}:1", capacity)

        def act() -> None:
            self._join(who)

        act()
        return act

    def rejoin(self) -> None:
        """A life joins once more, perhaps with another number of ranks."""
        if self.known:
            who = self.pick(self.known[-6:])
            self._join(replace(who, size=1 + self.below(2) if who.index is None else 1))

    def _join(self, who: Incarnation) -> None:
        self.log.append(f"join {who.name} size={who.size} {who.nonce} capacity={who.capacity_tokens}")
        self.oracle.open()
        life = self.oracle.lives.get(who.name)
        if life and life.who.nonce == who.nonce:
            if life.who.size != who.size:
                self.run(protocol.join(POOL, who), WrongSize)
            else:
                assert self.run(protocol.join(POOL, who)) == replace(who, epoch=life.who.epoch)
        else:
            joined = self.run(protocol.join(POOL, who))
            assert joined
            assert joined.epoch > self.oracle.last_epoch, "an epoch was given before"
            assert joined.epoch >= self.now
            self.oracle.begin(joined, 0, self.now)
            self.known.append(joined)
            self.steps_of[who.nonce] = 0
        self.check()

    def report(self) -> Callable[[], None] | None:
        if not self.known:
            return None
        who = self.pick(self.known[-8:])
        step = max(0, self.steps_of[who.nonce] + self.pick((1, 1, 1, 0, -1, 7)))
        some = self.weather.counts
        counts = [
            RankCounts(self.pick(some), self.pick(some), self.pick((None, 0, 812)), self.pick((None, 1_000)))
            for _ in who.ranks
        ]
        received = [in_flight_id(self.request_id()) for _ in range(self.pick((0, 1, 3, 8)))]
        self.steps_of[who.nonce] = max(step, self.steps_of[who.nonce])

        def act() -> None:
            self._report(who, Report(step, counts, received))

        act()
        return act

    def _report(self, who: Incarnation, report: Report) -> None:
        oracle, operation = self.oracle, protocol.report(POOL, who, report)
        oracle.open()
        self.log.append(f"report of {who.name} {who.nonce} {report}")
        life = oracle.lives.get(who.name)
        if any(other.who.epoch > who.epoch for other in oracle.overlapping(who)):
            self.run(operation, Fenced)
        elif life and life.who.epoch == who.epoch and life.who.size != who.size:
            self.run(operation, WrongSize)
        else:
            outcome = self.run(operation)
            if not life or life.who.epoch < who.epoch:
                life = oracle.begin(who, -1, self.now)
            oracle.end(str(id_) for id_ in report.received)
            if report.step < life.step:
                assert outcome is Reported.LATE
            else:
                assert outcome is (Reported.REPEATED if report.step == life.step else Reported.APPLIED)
                held = ((c.holding_tokens, c.requests) for c in report.counts)
                oracle.held.update(zip(who.ranks, held, strict=True))
                for rank, c in zip(who.ranks, report.counts, strict=True):
                    oracle.pressure.pop(rank, None)
                    if (c.pending_tokens, c.kv_permille) != (None, None):
                        known = ("-" if count is None else str(count) for count in (c.pending_tokens, c.kv_permille))
                        oracle.pressure[rank] = " ".join(known)
                life.step, life.silent = report.step, False
                life.lease_ends = self.now + oracle.ms("engine_lease_ms")
                oracle.end_leases(self.now, 256)
        self.check()

    def leave(self) -> Callable[[], None] | None:
        if not self.known:
            return None
        who = self.pick(self.known[-8:])

        def act() -> None:
            self.log.append(f"leave {who.name} {who.nonce}")
            life = self.oracle.lives.get(who.name)
            if life and life.who.epoch > who.epoch:
                self.run(protocol.leave(POOL, who), Fenced)
            else:
                self.run(protocol.leave(POOL, who))
                if life:
                    self.oracle.remove(life)
            self.check()

        act()
        return act

    def drain(self) -> Callable[[], None]:
        engine, index, undo = self.pick("abc"), self.pick((None, 0, 1, 3)), bool(self.below(2))

        def act() -> None:
            self.log.append(f"{'undrain' if undo else 'drain'} {engine} {index}")
            operation = protocol.drain(POOL, engine, index, undo)
            lives = [life for life in self.oracle.lives.values() if life.who.engine == engine]
            ranks = {
                rank: life for life in lives for rank in life.who.ranks if index is None or rank == f"{engine}/{index}"
            }
            if ranks and self.oracle.settings:
                for rank, life in ranks.items():
                    (life.draining.discard if undo else life.draining.add)(rank)
                assert self.run(operation) == len(self.oracle.loads())
            else:
                self.run(operation, InvalidInput)
            self.check()

        act()
        return act

    def configure(self) -> Callable[[], None]:
        changes = self.pick(self.weather.changes)

        def act() -> None:
            self.log.append(f"configure {changes}")
            self.run(protocol.configure(POOL, changes))
            self.oracle.open()
            self.oracle.settings.update({name: str(value) for name, value in changes.items()})
            self.check()

        act()
        return act

    def pass_time(self) -> None:
        moved = self.pick(self.weather.moves_ms)
        self.log.append(f"the clock moves by {moved} ms")
        self.set_clock(self.now + moved)

    def lose_settings(self) -> None:
        """Somebody deletes the settings: there is no pool until an engine joins or reports, and then a new one."""
        self.log.append("the settings are deleted")
        self.wire.ask("DEL", pool_keys(POOL)[0])
        self.oracle.lose_settings()

    def finish(self) -> None:
        """Leases end: nothing is in flight any more. Everybody leaves: nothing but the settings is left."""
        self.log.append("finish")
        self._join(Incarnation("z", 1, "last"))
        self.set_clock(self.now + max(FORGET_MS, BOOKING_LEASE_MS) + 1)
        self._report(self.known[-1], Report(1, [RankCounts(0, 0)]))
        assert not self.oracle.bookings
        for life in list(self.oracle.lives.values()):
            self.run(protocol.leave(POOL, life.who))
            self.oracle.remove(life)
        self.check()
        assert set(self.wire.ask("KEYS", "*")) == {CLOCK_KEY, f"dpb:{{{POOL}}}:pool"}


OTHER_POLICIES = tuple({"policy": name} for name in policies() if name not in ("round_robin", "minimum_tokens"))


@dataclass(frozen=True)
class Weather:
    """What a program is likely to meet."""

    request_ids: int
    list_lengths: Sequence[int]
    tokens: Sequence[int]
    counts: Sequence[int]
    capacities: Sequence[int | None]
    moves_ms: Sequence[int]
    changes: Sequence[dict[str, object]]
    loads_wanted_one_in: int
    restricted_one_in: int
    acts: Sequence[Callable[[Program], Callable[[], None] | None]]


ROUGH = Weather(  # everything happens, and most of it at a limit
    request_ids=40,
    list_lengths=(1, 1, 1, 2, 5, 12),
    tokens=(1, 2, 7, 100, 1_000, 2**31 - 1),
    counts=(0, 1, 50, 999, 2**40),
    capacities=(None, None, 1, 500, 5_000),
    moves_ms=(0, 1, 999, ENGINE_LEASE_MS - 1, ENGINE_LEASE_MS, BOOKING_LEASE_MS, FORGET_MS, -1, -7_000),
    changes=(
        {"policy": "round_robin"},
        {"policy": "minimum_tokens"},
        *OTHER_POLICIES,
        {"when_full": "least_loaded"},
        {"when_full": "refuse"},
        {"when_silent": "last_known"},
        {"when_silent": "refuse"},
        {"engine_lease_ms": 9_000, "booking_lease_ms": 3_000},
        {"weights": "a=2,b/1=0.25"},
        {"weights": "equal"},
        {"slow_start_ms": 3_000},
        {"slow_start_ms": 0},
        {"envelope.k": 1, "pending_envelope.k": 0},
    ),
    loads_wanted_one_in=2,
    restricted_one_in=3,
    acts=(
        *[Program.dispatch] * 16,
        *[Program.report] * 12,
        *[Program.release] * 6,
        *[Program.renew] * 4,
        *[Program.join] * 4,
        *[Program.pass_time] * 6,
        *[Program.drain] * 4,
        *[Program.rejoin] * 2,
        *[Program.leave] * 2,
        *[Program.configure] * 2,
        Program.lose_settings,
    ),
)
CALM = Weather(  # dispatch is what it mostly is, one new request and few ties, until something happens
    request_ids=150,
    list_lengths=(1, 1, 1, 1, 1, 1, 1, 3),
    tokens=range(1, 2_000),
    counts=range(5_000),
    capacities=(None,) * 7 + (5_000,),
    moves_ms=(0, 1, 100, 300, 300, 1_000, 2_000, ENGINE_LEASE_MS, -1, -300, -2_000),
    changes=(
        {"policy": "round_robin"},
        {"policy": "minimum_tokens"},
        *OTHER_POLICIES,
        {"when_silent": "last_known"},
        {"when_silent": "last_known"},
        {"booking_lease_ms": 600},
        {"booking_lease_ms": 1_100, "engine_lease_ms": 60_000},
        {"engine_lease_ms": 700},
        {"engine_lease_ms": 5_000},
        {"weights": "b=0.5"},
        {"weights": "equal"},
    ),
    loads_wanted_one_in=10,
    restricted_one_in=3,
    acts=(
        *[Program.dispatch] * 40,
        *[Program.report] * 12,
        *[Program.release] * 6,
        *[Program.renew] * 4,
        *[Program.pass_time] * 8,
        *[Program.join] * 3,
        *[Program.drain] * 3,
        Program.rejoin,
        Program.leave,
        Program.configure,
        Program.configure,
        Program.lose_settings,
    ),
)


@contextmanager
def told(program: Program, replay: str) -> Iterator[None]:
    """A failure inside tells the line that failed, the program's last steps, and the line that replays it."""
    try:
        yield
    except (AssertionError, ValueError, KeyError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        steps = "\n  ".join(program.log[-25:])
        story = f"after {program.operations} operations, the last:\n  {steps}"
        raise AssertionError(f"{str(error) or line}\n{story}\n{replay}") from error


def _in_order_of_placing(
    requests: Sequence[Request], outcomes: Sequence[Placement | NoRankReason]
) -> list[tuple[Request, Placement | NoRankReason]]:
    """The largest first, then those that stand in the list a second time."""
    first: dict[str, tuple[Request, Placement | NoRankReason]] = {}
    again = []
    for answered in zip(requests, outcomes, strict=True):
        if first.setdefault(answered[0].request_id, answered) is not answered:
            again.append(answered)
    return sorted(first.values(), key=lambda answered: -answered[0].tokens) + again


def _engine(name: str, record: str) -> tuple[object, ...]:
    fields = dict(part.split("=", 1) for part in record.split(" "))
    size, listed, first = int(fields["size"]), fields["draining"], int(name.partition("/")[2] or 0)
    indices = {"all": range(first, first + size), "-": range(0)}.get(listed)
    draining = frozenset(indices if indices is not None else map(int, listed.split(",")))
    return fields["state"], int(fields["epoch"]), int(fields["step"]), size, draining


def _booking(record: str) -> tuple[str, int]:
    rank, tokens, *_ = record.split(" ")
    return rank, int(tokens)
