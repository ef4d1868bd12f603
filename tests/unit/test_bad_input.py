"""Whatever is wrong, in an argument or in Redis, has a clear error, and leaves the state as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import redis

from balancer import (
    CorruptPool,
    Dispatcher,
    InvalidInput,
    NewerSchema,
    RankCounts,
    Reporter,
    Request,
    UnknownPool,
    protocol,
)
from balancer.admin import PoolAdmin
from balancer.keys import KEY_NAMES, pool_keys
from balancer.model import Incarnation, Report, Scope, in_flight_id
from balancer.protocol import Operation

Join = Callable[..., Reporter]
Run = Callable[[Operation[Any]], Any]
NAN = float("nan")
HUGE = pytest.param(10**5_000, id="huge")


def contents(client: redis.Redis) -> dict[str, object]:
    """Every key of the server with all that it holds."""
    read = {
        "string": client.get,
        "list": lambda key: client.lrange(key, 0, -1),
        "hash": client.hgetall,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
    }
    return {key: read[client.type(key)](key) for key in client.scan_iter()}


@pytest.fixture
def engine(join: Join, dispatcher: Dispatcher) -> Reporter:
    """An engine of two ranks with a limit, one request in flight: every key of the pool exists."""
    engine = join("e", 2, capacity_tokens=1_000)
    engine.report(1, [RankCounts(5, 1), RankCounts(6, 1)])
    dispatcher.dispatch("booked", 10)
    return engine


@pytest.fixture(params=["minimum_tokens", "envelope"])
def ordinary(request: pytest.FixtureRequest, join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> Reporter:
    """The same without a limit: dispatch takes its short way, where the policy has one."""
    admin.configure(policy=request.param)
    engine = join("e", 2)
    engine.report(1, [RankCounts(5, 1), RankCounts(6, 1)])
    dispatcher.dispatch("booked", 10)
    return engine


# -- arguments


@pytest.mark.parametrize(
    "tokens",
    [-1, 0, 0.5, 1.0001, NAN, float("inf"), -float("inf"), 2**31, 1e300, HUGE, "12", None, True, [1], b"1"],
)
def test_tokens_must_be_a_whole_number_in_range(
    engine: Reporter, dispatcher: Dispatcher, client: redis.Redis, tokens: Any
) -> None:
    before = contents(client)
    with pytest.raises(InvalidInput, match="tokens must be"):
        dispatcher.dispatch("a", tokens)
    assert contents(client) == before


def test_a_whole_float_and_the_extremes_pass(engine: Reporter, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    admin.configure(when_full="least_loaded")
    for request_id, tokens in (("float", 12.0), ("least", 1), ("most", 2**31 - 1)):
        assert dispatcher.dispatch(request_id, tokens).outcome == "placed"  # type: ignore[arg-type]


@pytest.mark.parametrize("request_id", ["", "x" * 513, "x" * 10_000, "ü" * 257, "\ud800", None, 7, b"a", ["a"]])
def test_a_request_id_must_be_text_of_1_to_512_bytes(
    engine: Reporter, dispatcher: Dispatcher, client: redis.Redis, request_id: Any
) -> None:
    before = contents(client)
    with pytest.raises(InvalidInput, match="request id"):
        dispatcher.dispatch(request_id, 1)
    with pytest.raises(InvalidInput, match="request id"):
        dispatcher.release(request_id)
    with pytest.raises(InvalidInput, match="request id"):
        dispatcher.dispatch_many([Request("good", 1), Request(request_id, 1)])
    assert contents(client) == before


@pytest.mark.parametrize(
    "request_id", [" ", "a b", "line\nbreak", "nul\0nul", "%d %s", "ü" * 256, "🙂", "{p}", "'quoted\"", "e/0 9 9 d r"]
)
def test_any_other_text_is_a_request_id(
    engine: Reporter, dispatcher: Dispatcher, admin: PoolAdmin, request_id: str
) -> None:
    first = dispatcher.dispatch(request_id, 1)
    assert dispatcher.dispatch(request_id, 1).rank == first.rank
    assert dispatcher.release(request_id) == 1
    assert sum(rank.in_flight_tokens for rank in admin.snapshot().ranks) == 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"engine": "a/b"}, "engine name"),
        ({"engine": ""}, "engine name"),
        ({"engine": "x" * 65}, "engine name"),
        ({"engine": None}, "engine name"),
        ({"size": 0}, "number of ranks"),
        ({"size": 1_025}, "number of ranks"),
        ({"size": 1.5}, "number of ranks"),
        ({"size": 2, "index": 0}, "alone"),
        ({"index": -1}, "rank index"),
        ({"index": 1_024}, "rank index"),
        ({"capacity_tokens": 0}, "capacity"),
        ({"capacity_tokens": 2**41}, "capacity"),
        ({"address": "two words"}, "address"),
        ({"address": "x" * 257}, "address"),
        ({"address": "10.0.0.7\udcff"}, "half character that UTF-8 cannot carry: leave it out"),
        ({"engine": "e\udcff"}, "engine name"),
        ({"nonce": "a b"}, "nonce"),
    ],
)
def test_what_an_engine_says_of_itself_is_checked(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        Incarnation(**{"engine": "e", "size": 1, "nonce": "n", **arguments})


@pytest.mark.parametrize("counts", [[], [RankCounts(1, 1)], [RankCounts(1, 1)] * 3])
def test_a_report_must_have_one_count_for_each_rank(
    engine: Reporter, client: redis.Redis, counts: list[RankCounts]
) -> None:
    before = contents(client)
    with pytest.raises(InvalidInput, match=f"reports 2 ranks, not {len(counts)}"):
        engine.report(2, counts)
    assert contents(client) == before


@pytest.mark.parametrize("count", [-1, 0.5, NAN, 2**41, HUGE, "7", None])
def test_counts_and_steps_must_be_whole_numbers_in_range(engine: Reporter, client: redis.Redis, count: Any) -> None:
    before = contents(client)
    for make in (
        lambda: RankCounts(count, 1),
        lambda: RankCounts(1, count),
        *([lambda: RankCounts(1, 1, count), lambda: RankCounts(1, 1, 0, count)] if count is not None else []),
        lambda: engine.report(count, [RankCounts(1, 1)] * 2),
    ):
        with pytest.raises(InvalidInput, match="must be"):
            make()
    assert contents(client) == before


@pytest.mark.parametrize("received", [-1, 2**63, 1.5, "7", None])
def test_received_ids_must_be_63_bit_numbers(engine: Reporter, client: redis.Redis, received: Any) -> None:
    before = contents(client)
    with pytest.raises(InvalidInput, match="received id"):
        engine.report(2, [RankCounts(1, 1)] * 2, [received])
    assert contents(client) == before


def test_a_report_before_the_join_is_refused() -> None:
    with pytest.raises(InvalidInput, match="join first"):
        protocol.report("p", Incarnation("e", 1, "n"), Report(1, [RankCounts(1, 1)]))


@pytest.mark.parametrize(("engine_name", "index"), [("a/b", None), ("e", -1), ("e", 0.5), ("", None)])
def test_what_to_drain_is_checked(engine: Reporter, admin: PoolAdmin, engine_name: str, index: Any) -> None:
    with pytest.raises(InvalidInput):
        admin.drain(engine_name, index)


def test_an_unknown_pool_is_called_unknown_and_not_made(admin: PoolAdmin, client: redis.Redis) -> None:
    with pytest.raises(UnknownPool, match="no pool 'p' in this Redis"):
        admin.snapshot()
    assert client.keys() == []


# -- what lies in Redis


def operations(engine: Reporter) -> dict[str, Operation[Any]]:
    """Every way of writing to a pool, by name."""
    known = engine.incarnation
    counts = [RankCounts(50, 5), RankCounts(60, 6)]
    return {
        "join": protocol.join("p", Incarnation("new", 1, "n", capacity_tokens=9)),
        "join anew": protocol.join("p", Incarnation("e", 3, "n")),
        "report": protocol.report("p", known, Report(2, counts, [in_flight_id("booked")])),
        "report of nothing received": protocol.report("p", known, Report(2, counts)),
        "dispatch": protocol.dispatch("p", "d", [Request("a", 1), Request("b", 2)], want_loads=True),
        "dispatch again": protocol.dispatch("p", "d", [Request("booked", 10), Request("c", 1)]),
        "dispatch among some": protocol.dispatch("p", "d", [Request("a", 1)], scope=Scope(among=["e/0"])),
        "release": protocol.release("p", ["booked", "unknown"]),
        "renew": protocol.renew("p", [("booked", 99), ("unknown", 1)]),
        "drain": protocol.drain("p", "e", 0),
        "undrain": protocol.drain("p", "e", undo=True),
        "leave": protocol.leave("p", known),
        "configure": protocol.configure("p", {"when_full": "least_loaded"}),
    }


OPERATIONS = [
    "join",
    "join anew",
    "report",
    "report of nothing received",
    "dispatch",
    "dispatch again",
    "dispatch among some",
    "release",
    "renew",
    "drain",
    "undrain",
    "leave",
    "configure",
]
DISPATCH_NEVER_READS = ("holding", "requests", "engines", "pressure")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("policy", ["minimum_tokens", "round_robin", "envelope"])
def test_a_key_of_a_foreign_type_is_refused_and_nothing_is_written(
    engine: Reporter, run: Run, admin: PoolAdmin, client: redis.Redis, operation: str, policy: str
) -> None:
    admin.configure(policy=policy)
    perform = operations(engine)[operation]
    for name, key in zip(KEY_NAMES, pool_keys("p"), strict=True):
        is_read = name not in (*DISPATCH_NEVER_READS, *(["queues"] if policy != "envelope" else []))
        if operation.startswith("dispatch") and not is_read:
            continue
        for foreign in (client.set, client.rpush):
            if is_there := client.exists(key):  # not all are, always
                client.rename(key, "kept")
            foreign(key, "foreign")
            before = contents(client)
            with pytest.raises(CorruptPool, match="did not write"):
                run(perform)
            assert contents(client) == before, f"{operation} wrote although {name} is foreign"
            client.delete(key)
            if is_there:
                client.rename("kept", key)
    run(perform)
    client.flushall()


WAYS = {
    "short": protocol.dispatch("p", "d", [Request("a", 1)]),
    "short again": protocol.dispatch("p", "d", [Request("booked", 10)]),
}
NEED_NOT_READ = {
    "short": {"engines", "leases", "queues"},
    "short again": {"leases", "in_flight", "in_flight_requests", "queues"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in KEY_NAMES if name not in (*DISPATCH_NEVER_READS, "capacity")])
def test_a_foreign_key_on_the_short_way_of_dispatch_changes_nothing_else(
    ordinary: Reporter, run: Run, client: redis.Redis, way: str, name: str
) -> None:
    key, refused = f"dpb:{{p}}:{name}", False
    client.set("foreign", "foreign")
    client.rename("foreign", key)
    client.pexpire(key, 60_000)
    before = contents(client)
    try:
        run(WAYS[way])
    except CorruptPool:
        refused = True
    assert refused or name in NEED_NOT_READ[way]
    assert not refused or contents(client) == before
    client.flushall()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("in_flight", "e/0"),
        ("in_flight", "e/1"),
        ("in_flight_requests", "e/0"),
        ("in_flight_requests", "e/1"),
        ("pool", "ordinary"),
        ("pool", "queue_sums"),
        ("pool", "largest"),
        ("bookings", str(in_flight_id("a"))),
    ],
)
def test_junk_on_the_short_way_of_dispatch_is_refused_or_does_no_harm(
    ordinary: Reporter, run: Run, client: redis.Redis, way: str, name: str, field: str
) -> None:
    client.hset(f"dpb:{{p}}:{name}", field, "junk")
    before, refused = contents(client), False
    try:
        run(WAYS[way])
    except CorruptPool:
        refused = True
    assert not refused or contents(client) == before
    client.flushall()


@pytest.mark.parametrize("name", [name for name in KEY_NAMES if name not in ("leases", "loads", "queues")])
def test_a_look_at_a_pool_with_a_foreign_key_is_refused_too(
    engine: Reporter, admin: PoolAdmin, client: redis.Redis, name: str
) -> None:
    client.set(f"dpb:{{p}}:{name}", "foreign", px=60_000)
    with pytest.raises(CorruptPool, match="did not write"):
        admin.snapshot()
    client.flushall()


@pytest.mark.parametrize("field", ["engine_lease_ms", "forget_ms"])
def test_junk_in_a_lease_that_a_dispatch_does_not_need_makes_no_outage_of_a_booking(
    engine: Reporter, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis, field: str
) -> None:
    """The first dispatch after a change notes until when the short way may be gone, which asks for all leases."""
    admin.configure(policy="minimum_tokens")
    client.hset("dpb:{p}:pool", field, "junk")
    assert dispatcher.dispatch("a", 5).outcome == "placed"
    assert dispatcher.counters.outages == 0
    with pytest.raises(CorruptPool, match="the leases in the pool's settings"):  # who needs it
        engine.report(2, [RankCounts(0, 0)] * 2)
    client.flushall()


JUNK = [
    ("engines", "e", "junk"),
    ("engines", "e", "state=up epoch=x life=1 step=1 size=2 reported_ms=1 draining=- nonce=n address="),
    ("bookings", str(in_flight_id("booked")), "junk"),
    ("in_flight", "e/0", "junk"),
    ("in_flight_requests", "e/0", "junk"),
    ("capacity", "e/0", "junk"),
    ("pool", "schema", "junk"),
    ("pool", "engine_lease_ms", "junk"),
    ("pool", "booking_lease_ms", "junk"),
    ("pool", "forget_ms", "junk"),
    ("pool", "last_epoch", "junk"),
    ("pool", "lives", "junk"),
    ("pool", "turn", "junk"),
    ("pool", "policy", "junk"),
    ("holding", "e/0", "junk"),
    ("holding", "stranger/0", "1"),
    ("requests", "e/0", "junk"),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("name", "field", "value"), JUNK)
def test_a_junk_value_is_refused_and_nothing_is_written_or_it_does_no_harm(
    engine: Reporter, run: Run, client: redis.Redis, operation: str, name: str, field: str, value: str
) -> None:
    perform = operations(engine)[operation]
    client.hset(f"dpb:{{p}}:{name}", field, value)
    before, refused = contents(client), False
    try:
        run(perform)
    except CorruptPool:
        refused = True
    assert not refused or contents(client) == before
    client.flushall()


@pytest.mark.parametrize(("name", "field", "value"), JUNK)
def test_a_look_at_junk_is_refused_or_shows_the_rest(
    engine: Reporter, admin: PoolAdmin, client: redis.Redis, name: str, field: str, value: str
) -> None:
    client.hset(f"dpb:{{p}}:{name}", field, value)
    with contextlib.suppress(CorruptPool):
        assert admin.snapshot().engines
    client.flushall()


@pytest.mark.parametrize("operation", [*OPERATIONS, "snapshot"])
def test_a_pool_of_a_newer_release_is_left_alone(
    engine: Reporter, run: Run, client: redis.Redis, operation: str
) -> None:
    perform = {**operations(engine), "snapshot": protocol.snapshot("p")}[operation]
    client.hset("dpb:{p}:pool", "schema", "2")
    before = contents(client)
    with pytest.raises(NewerSchema, match="pool 'p' has schema 2, newer than this release knows: upgrade"):
        run(perform)
    assert contents(client) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_pool_of_a_newer_release_is_left_alone_on_the_short_way_too(
    ordinary: Reporter, run: Run, client: redis.Redis, way: str
) -> None:
    client.hset("dpb:{p}:pool", "schema", "2")
    before = contents(client)
    with pytest.raises(NewerSchema):
        run(WAYS[way])
    assert contents(client) == before
