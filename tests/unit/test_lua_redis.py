"""The simulator's Redis answers as the real one does: the same scripts, the same replies, the same keys."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from balancer import protocol
from balancer.embedded import EmbeddedRedis
from balancer.keys import pool_keys
from balancer.model import Incarnation, RankCounts, Report, Request
from balancer.protocol import Operation
from balancer.scripts import Script, load_script, policy_names, script_names
from tests.clock import CLOCK_KEY, script_with_test_clock
from tests.property.program import POOL, Program, told
from tests.property.wire import Wire

pytest.importorskip("lupa", reason="the simulator's embedded Lua is an extra: pip install '.[simulator]'")

from balancer.simulator.lua_redis import LuaRedis
from balancer.simulator.sorted_set import SortedSet

STEPS, SEED = 1_500, 7
LOOK_AT_KEYS_EVERY = 25
PLACEMENTS_OF_A_POLICY = 250
SHIPPED = {script_with_test_clock(name).sha: load_script(name) for name in script_names()}


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with EmbeddedRedis() as server:
        wire = Wire(server.url)
        yield wire
        wire.close()


class TimelessKeys(LuaRedis):
    """Keys that never end: the test's clock moves by hours, which the real Redis does not see pass."""

    def expiry_ms(self) -> int:
        return 0


class Mirror:
    """A wire to a real Redis on which every script is also run here, and every reply compared.

    Redis runs the scripts with the test's clock, the simulator's Redis runs them as shipped, on its own.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire, self._here = wire, TimelessKeys()
        self._expected: list[tuple[bool, Any]] = []
        self.compared = 0

    def send(self, *commands: Sequence[str | int]) -> None:
        for command in commands:
            self._expected.append(self._run_here(command))
        self._wire.send(*[tuple(command) for command in commands])

    def read(self) -> Any:
        reply = self._wire.read()
        is_ours, expected = self._expected.pop(0)
        if is_ours:
            assert _comparable(expected) == _comparable(reply)
            self.compared += 1
        return reply

    def ask(self, *command: str | int) -> Any:
        self.send(command)
        return self.read()

    def compare_keys(self, pool: str) -> None:
        for key in pool_keys(pool):
            kind, content = self._here.dump(key)
            assert kind == self._wire.ask("TYPE", key), key
            if kind != "none":
                look = ("HGETALL", key) if kind == "hash" else ("ZRANGE", key, 0, -1, "WITHSCORES")
                theirs = self._wire.ask(*look)
                assert _pairs(kind, content) == _pairs(kind, theirs), key

    def _run_here(self, command: Sequence[str | int]) -> tuple[bool, Any]:
        if command[0] == "FLUSHALL":
            self._here = TimelessKeys()
        elif command[:2] == ("SET", CLOCK_KEY):
            self._here.now_ms = int(command[2])
        elif command[0] == "DEL":
            delete = Script("delete", "return redis.call('DEL', unpack(KEYS))", "delete")
            return True, self._evaluate(delete, command[1:], ())
        elif command[0] == "EVALSHA" and command[1] in SHIPPED:
            keys = 3 + int(command[2])
            return True, self._evaluate(SHIPPED[str(command[1])], command[3:keys], command[keys:])
        return False, None

    def _evaluate(self, script: Script, keys: Sequence[str | int], arguments: Sequence[str | int]) -> Any:
        return self._here.evaluate(script, [str(key) for key in keys], arguments)


def _comparable(reply: Any) -> Any:
    """Of several lives that fence a report, the first in a hash is told of, and a hash has no order."""
    return reply[:1] if isinstance(reply, list) and reply[:1] == ["fenced"] else reply


def _pairs(kind: str, flat: Sequence[str]) -> object:
    """A hash has no order, a sorted set is one."""
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    return dict(pairs) if kind == "hash" else pairs


def test_a_long_random_program_gets_the_same_replies_and_leaves_the_same_keys(wire: Wire) -> None:
    mirror, source = Mirror(wire), random.Random(SEED)
    program = Program(mirror, source.randrange)  # type: ignore[arg-type]
    with told(program, f"seed {SEED}"):
        for step in range(STEPS):
            program.step()
            if step % LOOK_AT_KEYS_EVERY == 0:
                mirror.compare_keys(POOL)
    mirror.compare_keys(POOL)
    assert mirror.compared > STEPS / 2


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_decides_as_in_a_real_redis(wire: Wire, policy: str) -> None:
    mirror, source = Mirror(wire), random.Random(f"{SEED}/{policy}")
    mirror.ask("FLUSHALL")
    mirror.ask("SET", CLOCK_KEY, 1_790_000_000_000)
    for name in script_names():
        mirror.ask("SCRIPT", "LOAD", script_with_test_clock(name).text)

    def run(operation: Operation[Any]) -> Any:
        sha = script_with_test_clock(operation.script).sha
        return operation.read(mirror.ask("EVALSHA", sha, len(operation.keys), *operation.keys, *operation.arguments))

    run(protocol.configure(POOL, {"policy": policy}))
    engines = [run(protocol.join(POOL, Incarnation(name, 6, "n", capacity_tokens=90_000))) for name in "ab"]
    sent: dict[str, list[int]] = {"a": [], "b": []}
    for number in range(PLACEMENTS_OF_A_POLICY):
        size = source.choice((1, 1, 1, 4, 16))
        requests = [Request(f"{number}-{place}", source.randint(1, 4_000)) for place in range(size)]
        for placed in run(protocol.dispatch(POOL, "d", requests)).outcomes:
            sent[placed.engine].append(placed.request.in_flight_id)
        if number % 3 == 2:
            engine = source.choice(engines)
            counts = [RankCounts(source.randint(0, 60_000), source.randint(0, 60)) for _ in range(6)]
            run(protocol.report(POOL, engine, Report(number, counts, sent[engine.name])))
            sent[engine.name] = []
    mirror.compare_keys(POOL)


def test_a_sorted_set_orders_by_score_and_then_by_name() -> None:
    ordered = SortedSet()
    assert [ordered.put(name, score) for name, score in (("b", 2), ("a", 2), ("c", 1), ("b", 0))] == [
        True,
        True,
        True,
        False,
    ]
    assert ordered.by_rank(0, -1) == [(0, "b"), (1, "c"), (2, "a")]
    assert ordered.by_rank(-1, -1) == ordered.by_rank(2, 9) == [(2, "a")]
    assert ordered.by_score(0, 1) == [(0, "b"), (1, "c")]
    assert ordered.by_score(0, 2, above=True, below=True) == [(1, "c")]
    assert ordered.remove("b")
    assert not ordered.remove("b")
    assert len(ordered) == 2


def test_numbers_travel_between_lua_and_redis_as_they_do_in_redis() -> None:
    redis = LuaRedis()
    script = Script(
        "t", "redis.call('HSET', KEYS[1], 'a', 1.5, 'b', 3, 'c', 2^53) return redis.call('HGETALL', KEYS[1])", "t"
    )
    assert redis.evaluate(script, ["k"], []) == ["a", "1.5", "b", "3", "c", "9007199254740992"]
    reply = Script("u", "return {3.99, false, 'x', true, {1, nil, 2}, nil, 'unseen'}", "u")
    assert redis.evaluate(reply, [], []) == [3, None, "x", 1, [1]]


def test_a_key_ends_at_its_time_and_what_cannot_be_done_says_so() -> None:
    redis = LuaRedis(now_ms=1_000)
    write = Script("w", "redis.call('HSET', KEYS[1], 'a', 1) redis.call('PEXPIRE', KEYS[1], 50)", "w")
    redis.evaluate(write, ["k"], [])
    redis.now_ms += 49
    assert redis.dump("k") == ("hash", ["a", "1"])
    redis.now_ms += 1
    assert redis.dump("k") == ("none", [])
    trial = Script("p", "return redis.pcall('ZADD', KEYS[1], 1, 'm').err", "p")
    redis.evaluate(write, ["k"], [])
    assert str(redis.evaluate(trial, ["k"], [])).startswith("WRONGTYPE")
    with pytest.raises(NotImplementedError, match="no LPUSH yet"):
        redis.evaluate(Script("l", "redis.call('LPUSH', KEYS[1], 1)", "l"), ["k"], [])
