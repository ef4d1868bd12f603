"""Every operation on a pool as a value: which script, which keys and arguments, how to read the reply.

Pure: no Redis, no clock, no I/O. `balancer.store` performs an operation, sync or async; this is the only place that
knows the order of arguments and the shape of replies (the scripts' headers say the same).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn, TypeVar

from balancer.errors import CorruptPool, Fenced, InvalidInput, NewerSchema, NoRankReason, UnknownPool, WrongSize
from balancer.keys import pool_keys
from balancer.model import (
    MAX_REQUESTS_PER_DISPATCH,
    MAX_TOKENS,
    EngineState,
    EngineView,
    Incarnation,
    Outcome,
    Placement,
    PoolSettings,
    PoolSnapshot,
    RankCounts,
    RankView,
    Report,
    Reported,
    Request,
    Scope,
    checked_count,
    checked_name,
    checked_request_id,
    in_flight_id,
)
from balancer.policies import parameters
from balancer.pool_settings import checked_settings

T = TypeVar("T")
Reply = list[Any]

MAX_IDS_PER_RELEASE = 1_000
"""Most ids in one release; the bound of `lua/lib/end_bookings.lua`."""

MAX_IDS_PER_RENEW = 500
"""Most bookings in one renewal; the bound of `lua/renew.lua`."""

ANYWHERE = Scope()
"""A dispatch may choose any eligible rank of the pool."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One EVAL: `script` by name, its keys and arguments, and `read`: from the reply to a T, or raising `Refused`.

    `spent_s`: seconds of its budget that went by on what came before it.
    """

    script: str
    keys: tuple[str, ...]
    arguments: tuple[str | int, ...]
    read: Callable[[Reply], T]
    spent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The answer to a dispatch: for each request its placement or the reason why there is none, in the order given;
    `loads` the load of every eligible rank after it, if it was asked for; `knows_pool` False where Redis holds no pool
    of this name at all, so that nobody has joined it, or its data are lost."""

    outcomes: tuple[Placement | NoRankReason, ...]
    loads: Mapping[str, int] | None
    knows_pool: bool = True


def dispatch(
    pool: str, dispatcher: str, requests: Sequence[Request], want_loads: bool = False, scope: Scope = ANYWHERE
) -> Operation[Dispatched]:
    """Choose ranks within `scope` for 1 to MAX_REQUESTS_PER_DISPATCH requests and book them."""
    checked_name(dispatcher, "dispatcher name")
    if not 1 <= len(requests) <= MAX_REQUESTS_PER_DISPATCH:
        raise InvalidInput(f"a dispatch takes 1 to {MAX_REQUESTS_PER_DISPATCH} requests, not {len(requests)}")
    wanted = " ".join(["1" if want_loads else "0", *scope.among, *(f"-{rank}" for rank in scope.avoid)])
    arguments: list[str | int] = [dispatcher, wanted]
    for request in requests:
        arguments += (request.in_flight_id, request.tokens, request.request_id)

    def read(reply: Reply) -> Dispatched:
        if _text(reply[0]) == "unknown_pool":
            return Dispatched((NoRankReason.NOBODY_JOINED,) * len(requests), None, knows_pool=False)
        end = 2 + 3 * len(requests)
        reply = _read(pool, reply, "dispatched", max(end, len(reply)) if want_loads else end)
        outcomes: list[Placement | NoRankReason] = []
        for request, at in zip(requests, range(2, end, 3), strict=True):
            outcome, rank, load = _text(reply[at]), _text(reply[at + 1]), int(reply[at + 2])
            if outcome == "no_rank":
                outcomes.append(NoRankReason(rank))
            else:
                outcomes.append(Placement(request, rank, load, Outcome(outcome), bool(reply[1])))
        return Dispatched(tuple(outcomes), _counts(reply[end:]) if want_loads else None)

    return Operation("dispatch", pool_keys(pool), tuple(arguments), read)


def release(pool: str, request_ids: Sequence[str]) -> Operation[int]:
    """End the bookings of up to MAX_IDS_PER_RELEASE requests; reads how many there were."""
    if not 1 <= len(request_ids) <= MAX_IDS_PER_RELEASE:
        raise InvalidInput(f"a release takes 1 to {MAX_IDS_PER_RELEASE} request ids, not {len(request_ids)}")
    ids = tuple(in_flight_id(checked_request_id(request_id)) for request_id in request_ids)
    return Operation("release", pool_keys(pool), ids, lambda reply: int(_read(pool, reply, "released", 2)[1]))


def renew(pool: str, bookings: Sequence[tuple[str, int]]) -> Operation[int]:
    """Renew the leases of up to MAX_IDS_PER_RENEW bookings, each a request id and the tokens that it holds now (0: as
    booked); reads how many there were."""
    if not 1 <= len(bookings) <= MAX_IDS_PER_RENEW:
        raise InvalidInput(f"a renewal takes 1 to {MAX_IDS_PER_RENEW} bookings, not {len(bookings)}")
    arguments: list[int] = []
    for request_id, tokens in bookings:
        arguments += (in_flight_id(checked_request_id(request_id)), checked_count(tokens, "tokens", 0, MAX_TOKENS))
    return Operation("renew", pool_keys(pool), tuple(arguments), lambda reply: int(_read(pool, reply, "renewed", 2)[1]))


def join(pool: str, incarnation: Incarnation) -> Operation[Incarnation]:
    """Begin an engine's new life; reads the incarnation with its epoch."""

    def read(reply: Reply) -> Incarnation:
        return replace(incarnation, epoch=int(_read(pool, reply, "joined", 2, incarnation)[1]))

    return Operation("join", pool_keys(pool), _identity(incarnation), read)


def report(pool: str, incarnation: Incarnation, report: Report) -> Operation[Reported]:
    """Replace an engine's holding counts and end the bookings that they contain."""
    if incarnation.epoch < 1:
        raise InvalidInput("join first: a report carries the epoch that the join returned")
    if len(report.counts) != incarnation.size:
        raise InvalidInput(f"{incarnation.name} reports {incarnation.size} ranks, not {len(report.counts)}")
    arguments: list[str | int] = [*_identity(incarnation), incarnation.epoch, report.step]
    for counts in report.counts:
        arguments += (counts.holding_tokens, counts.requests, _pressure(counts))
    arguments += [checked_count(id_, "received id", 0, 2**63 - 1) for id_ in report.received]

    def read(reply: Reply) -> Reported:
        words = tuple(word.value for word in Reported)
        return Reported(_read(pool, reply, words, 2, incarnation)[0])

    return Operation("report", pool_keys(pool), tuple(arguments), read)


def leave(pool: str, incarnation: Incarnation) -> Operation[None]:
    """Remove an engine that shuts down."""

    def read(reply: Reply) -> None:
        _read(pool, reply, "left", 1, incarnation)

    return Operation("leave", pool_keys(pool), (incarnation.name, incarnation.epoch), read)


def drain(pool: str, engine: str, index: int | None = None, undo: bool = False) -> Operation[int]:
    """Take an engine, or one of its ranks, out of dispatch, or back in; reads how many ranks are eligible after it."""
    checked_name(engine, "engine name")
    verb = "undrain" if undo else "drain"
    where = "" if index is None else checked_count(index, "rank index")

    def read(reply: Reply) -> int:
        if reply and _text(reply[0]) == "unknown_rank":
            rank = engine if index is None else f"{engine}/{index}"
            raise InvalidInput(f"pool {pool!r} has no {rank!r}: `balancer status {pool}` lists its ranks")
        return int(_read(pool, reply, verb + "ed", 2)[1])

    return Operation("drain", pool_keys(pool), (verb, engine, where), read)


def configure(pool: str, changes: Mapping[str, object]) -> Operation[None]:
    """Change settings of the pool; `PoolSettings` lists them."""
    arguments = [part for item in checked_settings(changes).items() for part in item]

    def read(reply: Reply) -> None:
        _read(pool, reply, "configured", 1)

    return Operation("configure", pool_keys(pool), tuple(arguments), read)


def snapshot(pool: str) -> Operation[PoolSnapshot]:
    """Everything about the pool at one moment, but for the single bookings."""

    def read(reply: Reply) -> PoolSnapshot:
        _read(pool, reply, "snapshot", 12)
        try:
            return _snapshot(pool, reply)
        except (KeyError, ValueError) as error:
            raise CorruptPool(f"pool {pool!r} holds something that dp-balancer did not write: {error!r}") from error

    return Operation("snapshot", pool_keys(pool), (), read)


_UNKNOWN = "-"


def _pressure(counts: RankCounts) -> str:
    """What an engine knows of pending tokens and KV usage, as it is stored; empty where that is nothing."""
    known = (counts.pending_tokens, counts.kv_permille)
    return "" if known == (None, None) else " ".join(_UNKNOWN if count is None else str(count) for count in known)


def _pressure_of(rank: str, stored: Mapping[str, str]) -> tuple[int | None, int | None]:
    pending, usage = stored.get(rank, f"{_UNKNOWN} {_UNKNOWN}").split(" ")
    return (None if pending == _UNKNOWN else int(pending), None if usage == _UNKNOWN else int(usage))


def _identity(incarnation: Incarnation) -> tuple[str | int, ...]:
    limit = incarnation.capacity_tokens or 0
    return (incarnation.name, incarnation.size, incarnation.nonce, incarnation.address, limit)


def _read(
    pool: str, reply: Reply, words: str | tuple[str, ...], length: int, incarnation: Incarnation | None = None
) -> Reply:
    """The reply with its first word as text, or the error that the word stands for."""
    word = _text(reply[0])
    if word in ((words,) if isinstance(words, str) else words):
        assert len(reply) == length, f"script and protocol disagree on {word!r}"
        return [word, *reply[1:]]
    _refuse(pool, word, reply, incarnation)


def _refuse(pool: str, word: str, reply: Reply, incarnation: Incarnation | None) -> NoReturn:
    if word == "newer_schema":
        raise NewerSchema(
            f"pool {pool!r} has schema {_text(reply[1])}, newer than this release knows: upgrade dp-balancer here"
        )
    if word == "unknown_pool":
        raise UnknownPool(f"no pool {pool!r} in this Redis: check its name; a pool begins when an engine joins it")
    assert incarnation is not None, f"script and protocol disagree on {word!r}"
    if word == "fenced":
        raise Fenced(
            f"{incarnation.name} has a newer life (epoch {int(reply[1])}) than this one ({incarnation.epoch}): "
            "two engines may run under one name"
        )
    assert word == "wrong_size", f"script and protocol disagree on {word!r}"
    raise WrongSize(
        f"{incarnation.name} has joined with {int(reply[1])} ranks and now reports {incarnation.size}: "
        "join anew (a new nonce) to change the number"
    )


def _snapshot(pool: str, reply: Reply) -> PoolSnapshot:
    now_ms = int(reply[1])
    fields, records, holding, requests, in_flight, in_flight_requests, capacity = map(_fields, reply[2:9])
    pressure = _fields(reply[11])
    settings = PoolSettings(
        policy=fields["policy"],
        engine_lease_ms=int(fields["engine_lease_ms"]),
        booking_lease_ms=int(fields["booking_lease_ms"]),
        forget_ms=int(fields["forget_ms"]),
        when_silent=fields["when_silent"],
        when_full=fields["when_full"],
        slow_start_ms=int(fields.get("slow_start_ms", 0)),
        weights=fields.get("weights", "equal"),
        parameters={name: float(fields[name]) for name in parameters() if name in fields},
    )
    engines = [_engine_view(name, record, now_ms, settings) for name, record in sorted(records.items())]
    by_name, ranks = {engine.name: engine for engine in engines}, []
    for rank in sorted(holding, key=_rank_order):
        engine = by_name.get(rank) or by_name[rank.rpartition("/")[0]]
        draining = int(rank.rpartition("/")[2]) in engine.draining
        silent = engine.state is EngineState.SILENT
        pending_tokens, kv_permille = _pressure_of(rank, pressure)
        ranks.append(
            RankView(
                rank=rank,
                state=engine.state if silent else EngineState.DRAINING if draining else EngineState.UP,
                holding_tokens=int(holding[rank]),
                requests=int(requests[rank]),
                in_flight_tokens=int(in_flight[rank]),
                in_flight_requests=int(in_flight_requests[rank]),
                capacity_tokens=int(capacity[rank]) if rank in capacity else None,
                age_ms=engine.age_ms,
                pending_tokens=pending_tokens,
                kv_permille=kv_permille,
            )
        )
    next_deadline = reply[10]
    return PoolSnapshot(
        pool=pool,
        now_ms=now_ms,
        settings=settings,
        engines=tuple(engines),
        ranks=tuple(ranks),
        bookings=int(reply[9]),
        expired=int(fields.get("expired", 0)),
        oldest_deadline_ms=int(float(next_deadline[1])) if next_deadline else None,
    )


def _engine_view(name: str, record: str, now_ms: int, settings: PoolSettings) -> EngineView:
    fields = dict(part.split("=", 1) for part in record.split(" "))
    size, age_ms = int(fields["size"]), now_ms - int(fields["reported_ms"])
    first = int(name.partition("/")[2] or 0)
    indices = range(first, first + size)
    listed = fields["draining"]
    draining = frozenset(
        indices if listed == "all" else () if listed == "-" else (int(index) for index in listed.split(","))
    )
    if fields["state"] == "silent" or age_ms >= settings.engine_lease_ms:
        state = EngineState.SILENT
    else:
        state = EngineState.DRAINING if len(draining) == size else EngineState.UP
    return EngineView(
        name=name,
        state=state,
        epoch=int(fields["epoch"]),
        step=int(fields["step"]),
        size=size,
        reported_ms=int(fields["reported_ms"]),
        age_ms=age_ms,
        draining=draining,
        address=fields["address"],
    )


def _rank_order(rank: str) -> tuple[str, int]:
    engine, _, index = rank.rpartition("/")
    return engine, int(index)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _fields(flat: Sequence[bytes | str]) -> dict[str, str]:
    return {_text(flat[at]): _text(flat[at + 1]) for at in range(0, len(flat), 2)}


def _counts(flat: Sequence[bytes | str]) -> dict[str, int]:
    return {_text(flat[at]): int(float(flat[at + 1])) for at in range(0, len(flat), 2)}
