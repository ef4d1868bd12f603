"""A Redis for one process that runs the shipped scripts as they are, on a clock of our own.

Lua 5.1 comes from `lupa` (the extra `simulator`), as Redis embeds it; `redis.call` is the two dozen commands that the
scripts use, on dicts. `tests/unit/test_lua_redis.py` plays a long random program to this and to a real Redis and
compares every reply and every key. A command that is missing here says so. No persistence, no sandbox, one database.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from balancer.errors import InvalidInput
from balancer.scripts import Script
from balancer.simulator.sorted_set import SortedSet

Hash = dict[str, str]
Value = Hash | SortedSet
Reply = int | str | None | list[Any]
"""What a command replies; a script's reply is made of the same."""


class LuaMissing(InvalidInput):
    """The embedded Lua is not installed."""


class LuaRedis:
    """Keys, a clock in ms that stands still between settings, and scripts."""

    def __init__(self, now_ms: int = 1_790_000_000_000) -> None:
        try:
            from lupa import lua51
        except ImportError as error:
            raise LuaMissing(
                "the shipped Lua needs lupa: pip install '.[simulator]' in dp-balancer's folder, or use a Python policy"
            ) from error
        self.now_ms = now_ms
        self._values: dict[str, Value] = {}
        self._ends_ms: dict[str, int] = {}
        self._lua = lua51.LuaRuntime(unpack_returned_tuples=False)
        self._globals = self._lua.globals()
        self._table = self._lua.table_from
        self._type = lua51.lua_type
        self._compiled: dict[str, Any] = {}
        self._commands = {
            name.removeprefix("_do_").upper(): getattr(self, name) for name in dir(self) if name.startswith("_do_")
        }
        self._globals.redis = self._table({"call": self._call, "pcall": self._try})

    def expiry_ms(self) -> int:
        """The clock by which keys end."""
        return self.now_ms

    def evaluate(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Reply:
        """EVAL."""
        run = self._compiled.get(script.sha)
        if run is None:
            run = self._compiled[script.sha] = self._lua.compile(script.text)
        self._globals.KEYS = self._table(keys)
        self._globals.ARGV = self._table([str(argument) for argument in arguments])
        return self._reply_of(run())

    def dump(self, key: str) -> tuple[str, list[str]]:
        """A key's type and content, as TYPE and then HGETALL or ZRANGE WITHSCORES show it."""
        value = self._read(key)
        if value is None:
            return "none", []
        if isinstance(value, SortedSet):
            return "zset", [part for score, member in value.by_rank(0, -1) for part in (member, _number(score))]
        return "hash", [part for item in value.items() for part in item]

    def _call(self, name: str, *arguments: str | float) -> Any:
        command = self._commands.get(name)
        if command is None:
            raise NotImplementedError(f"balancer/simulator/lua_redis.py has no {name} yet")
        return self._to_lua(command(*[_text(argument) for argument in arguments]))

    def _try(self, name: str, *arguments: str | float) -> Any:
        """As `_call`, but what a real Redis would refuse is a table with the error."""
        try:
            return self._call(name, *arguments)
        except (TypeError, ValueError) as error:
            return self._table({"err": str(error)})

    def _to_lua(self, reply: Reply) -> Any:
        if isinstance(reply, list):
            return self._table([self._to_lua(part) for part in reply])
        return False if reply is None else reply

    def _reply_of(self, value: Any) -> Reply:
        """As Redis turns what a script returns into a reply: tables end at their first nil, fractions are cut off."""
        if self._type(value) == "table":
            parts: list[Any] = []
            while (part := value[len(parts) + 1]) is not None:
                parts.append(self._reply_of(part))
            return parts
        if isinstance(value, bool):
            return 1 if value else None
        return int(value) if isinstance(value, float) else value

    # -- keys

    def _read(self, key: str) -> Value | None:
        if self._ends_ms.get(key, math.inf) <= self.expiry_ms():
            self._drop(key)
        return self._values.get(key)

    def _drop(self, key: str) -> None:
        self._values.pop(key, None)
        self._ends_ms.pop(key, None)

    def _hash(self, key: str) -> Hash:
        value = self._read(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise TypeError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _set(self, key: str) -> SortedSet:
        value = self._read(key)
        if value is None:
            return SortedSet()
        if not isinstance(value, SortedSet):
            raise TypeError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _keep(self, key: str, value: Value) -> None:
        """A key that holds nothing is no key."""
        if len(value):
            self._values[key] = value
        else:
            self._drop(key)

    # -- commands, arguments as text

    def _do_time(self) -> Reply:
        return [str(self.now_ms // 1000), str(self.now_ms % 1000 * 1000)]

    def _do_exists(self, key: str) -> Reply:
        return int(self._read(key) is not None)

    def _do_del(self, *keys: str) -> Reply:
        found = [key for key in keys if self._read(key) is not None]
        for key in found:
            self._drop(key)
        return len(found)

    def _do_unlink(self, *keys: str) -> Reply:
        return self._do_del(*keys)

    def _do_pexpire(self, key: str, ms: str) -> Reply:
        if self._read(key) is None:
            return 0
        self._ends_ms[key] = self.expiry_ms() + int(ms)
        return 1

    def _do_pttl(self, key: str) -> Reply:
        if self._read(key) is None:
            return -2
        return self._ends_ms[key] - self.expiry_ms() if key in self._ends_ms else -1

    def _do_hget(self, key: str, field: str) -> Reply:
        return self._hash(key).get(field)

    def _do_hmget(self, key: str, *fields: str) -> Reply:
        return [*map(self._hash(key).get, fields)]

    def _do_hgetall(self, key: str) -> Reply:
        return [part for item in self._hash(key).items() for part in item]

    def _do_hkeys(self, key: str) -> Reply:
        return list(self._hash(key))

    def _do_hvals(self, key: str) -> Reply:
        return list(self._hash(key).values())

    def _do_hlen(self, key: str) -> Reply:
        return len(self._hash(key))

    def _do_hexists(self, key: str, field: str) -> Reply:
        return int(field in self._hash(key))

    def _do_hset(self, key: str, *parts: str) -> Reply:
        fields = self._hash(key)
        before = len(fields)
        fields.update(zip(parts[::2], parts[1::2], strict=True))
        self._keep(key, fields)
        return len(fields) - before

    def _do_hsetnx(self, key: str, field: str, value: str) -> Reply:
        return 0 if field in self._hash(key) else self._do_hset(key, field, value)

    def _do_hdel(self, key: str, *names: str) -> Reply:
        fields = self._hash(key)
        gone = sum(fields.pop(name, None) is not None for name in names)
        self._keep(key, fields)
        return gone

    def _do_hincrby(self, key: str, field: str, by: str) -> Reply:
        fields = self._hash(key)
        value = int(fields.get(field, "0")) + int(by)
        fields[field] = str(value)
        self._keep(key, fields)
        return value

    def _do_zadd(self, key: str, *parts: str) -> Reply:
        flags = 0
        while parts[flags] in ("XX", "NX", "CH", "INCR", "GT", "LT"):
            flags += 1
        given, pairs, members = set(parts[:flags]), parts[flags:], self._set(key)
        if given - {"XX", "NX", "INCR"}:
            raise NotImplementedError(f"balancer/simulator/lua_redis.py has no ZADD {' '.join(parts[:flags])} yet")
        added, result = 0, None
        for score, member in zip(pairs[::2], pairs[1::2], strict=True):
            before = members.score(member)
            if before is None if "XX" in given else before is not None and "NX" in given:
                continue
            result = float(score) + (before or 0.0) if "INCR" in given else float(score)
            added += members.put(member, result)
        self._keep(key, members)
        return added if "INCR" not in given else None if result is None else _number(result)

    def _do_zincrby(self, key: str, by: str, member: str) -> Reply:
        return self._do_zadd(key, "INCR", by, member)

    def _do_zrem(self, key: str, *names: str) -> Reply:
        members = self._set(key)
        gone = sum(members.remove(name) for name in names)
        self._keep(key, members)
        return gone

    def _do_zcard(self, key: str) -> Reply:
        return len(self._set(key))

    def _do_zscore(self, key: str, member: str) -> Reply:
        score = self._set(key).score(member)
        return None if score is None else _number(score)

    def _do_zmscore(self, key: str, *names: str) -> Reply:
        return [self._do_zscore(key, name) for name in names]

    def _do_zcount(self, key: str, least: str, most: str) -> Reply:
        return len(_between(self._set(key), least, most))

    def _do_zrange(self, key: str, first: str, last: str, *flags: str) -> Reply:
        if set(flags) - {"WITHSCORES"}:
            raise NotImplementedError(f"balancer/simulator/lua_redis.py has no ZRANGE {' '.join(flags)} yet")
        return _listed(self._set(key).by_rank(int(first), int(last)), bool(flags))

    def _do_zrangebyscore(self, key: str, least: str, most: str, *flags: str) -> Reply:
        found = _between(self._set(key), least, most)
        if "LIMIT" in flags:
            offset, count = (int(float(flag)) for flag in flags[flags.index("LIMIT") + 1 :][:2])
            found = found[offset:] if count < 0 else found[offset : offset + count]
        return _listed(found, "WITHSCORES" in flags)


def _text(argument: str | float) -> str:
    """An argument as Redis gets it from Lua: whole numbers as such, others with 17 digits."""
    if isinstance(argument, str):
        return argument
    return str(int(argument)) if argument == int(argument) and abs(argument) < 1e17 else f"{argument:.17g}"


def _number(score: float) -> str:
    return _text(score) if math.isfinite(score) else "inf" if score > 0 else "-inf"


def _between(members: SortedSet, least: str, most: str) -> list[tuple[float, str]]:
    low, high = float(least.removeprefix("(")), float(most.removeprefix("("))
    return members.by_score(low, high, above=least[:1] == "(", below=most[:1] == "(")


def _listed(found: Sequence[tuple[float, str]], with_scores: bool) -> Reply:
    if with_scores:
        return [part for score, member in found for part in (member, _number(score))]
    return [member for _, member in found]


Evaluate = Callable[[Script, Sequence[str], Sequence[str | int]], Reply]
"""EVAL, by whomever."""
