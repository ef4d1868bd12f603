"""What `balancer doctor` asks of the server itself. Reads only, and takes a forbidden command for an unknown answer.

Each check turns a `Server` into a finding. It raises `StoreUnavailable` alone: then there is nothing to find.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping
from typing import Any

from balancer.cli.finding import Finding, fail, ok, unknown, warn
from balancer.errors import BalancerError, Refused, StoreDenied, StoreError, StoreUnavailable
from balancer.keys import pool_keys
from balancer.protocol import release
from balancer.scripts import load_script, script_names
from balancer.settings import redacted
from balancer.store import Store

LEAST_VERSION = (6, 2)
_ROUND_TRIPS = 20
_SLOW_ROUND_TRIP_MS = 10.0
"""A dispatch has 100 ms by default and gives up on a single answer after 25."""
_FULL_SHARE = 0.8
_PROBE_ID = "balancer-doctor"
"""A request id that nobody books: releasing it runs a script and changes nothing."""

# Not one of lua/: no transition of a pool, only a question about this user's rights, which only Lua can ask without
# the rights of an administrator (Redis 7.0 and later).
_ACL_QUESTION = """
if not redis.acl_check_cmd then return {'unsupported'} end
local denied = {'denied'}
for _, name in ipairs(ARGV) do
  if not redis.acl_check_cmd(name, KEYS[1], KEYS[1], KEYS[1]) then denied[#denied + 1] = name end
end
return denied
"""


class Server:
    """A Redis as this user may see it. Replies that this user is denied are None."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool = store.settings.pool
        self.url = redacted(store.settings.url or "")
        self._info: dict[str, Mapping[str, str]] = {}

    def ask(self, *words: str | int) -> Any:
        """A command's reply, or None where the server refuses it. Raises StoreUnavailable."""
        try:
            return self.store.command(*words)
        except StoreUnavailable:
            raise
        except (StoreError, Refused):
            return None

    def info(self, section: str) -> Mapping[str, str]:
        """A section of INFO, asked for once; empty where it is denied."""
        if section not in self._info:
            lines = _text(self.ask("INFO", section) or "").splitlines()
            self._info[section] = dict(line.split(":", 1) for line in lines if ":" in line)
        return self._info[section]

    def setting(self, name: str) -> str | None:
        """A setting by CONFIG GET, or None where that is denied."""
        reply = self.ask("CONFIG", "GET", name)
        return _text(reply[1]) if reply and len(reply) == 2 else None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def check_version(server: Server) -> Finding:
    """Redis or Valkey, new enough."""
    info = server.info("server")
    if "redis_version" not in info:
        return unknown("server", f"{server.url} answers; this user may not ask its version", "needs 6.2 or later")
    named = info.get("server_name", "redis")
    version = info.get(f"{named}_version", info["redis_version"])
    flavour = {"redis": "Redis", "valkey": "Valkey"}.get(named)
    seen = f"{flavour or named} {version} at {server.url}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", info["redis_version"])[:2])
    if numbers < LEAST_VERSION:
        return fail("server", seen, "too old: dp-balancer needs Redis 6.2 or later, or any Valkey")
    if flavour is None:
        return warn("server", seen, "neither Redis nor Valkey: dp-balancer is not tested on it")
    return ok("server", seen)


def check_round_trip(server: Server) -> Finding:
    """How long one answer takes: a dispatch is one."""
    times_ms = []
    for _ in range(_ROUND_TRIPS):
        begun = time.perf_counter()
        server.ask("PING")
        times_ms.append((time.perf_counter() - begun) * 1000)
    median_ms = statistics.median(times_ms)
    seen = f"median {median_ms:.2f} ms, longest of {_ROUND_TRIPS} {max(times_ms):.2f} ms"
    if median_ms > _SLOW_ROUND_TRIP_MS:
        return warn("round trip", seen, "each dispatch takes one: put Redis nearer, or raise DP_BALANCER_BUDGET_MS")
    return ok("round trip", seen)


def check_clock(server: Server) -> Finding:
    """How far this machine's clock is from Redis'; for information."""
    begun = time.time()
    reply = server.ask("TIME")
    ended = time.time()
    if reply is None:
        return unknown("clock", "TIME is denied to this user", "the scripts need it: allow +time")
    away_ms = (int(reply[0]) + int(reply[1]) / 1e6 - (begun + ended) / 2) * 1000
    return ok("clock", f"Redis is {away_ms:+.1f} ms from this machine; nothing depends on it")


def check_role(server: Server) -> Finding:
    """A replica takes no writes."""
    role = server.info("replication").get("role")
    if role is None:
        return unknown("role", "INFO replication is denied to this user", "must be a primary, not a replica")
    if role != "master":
        return fail("role", "a read-only replica", "give the primary's address: every dispatch writes")
    return ok("role", "primary")


def check_memory(server: Server) -> Finding:
    """Nothing may be evicted, and there must be room."""
    info = server.info("memory")
    policy = info.get("maxmemory_policy") or server.setting("maxmemory-policy")
    if not policy:
        return unknown("memory", "maxmemory-policy is not visible to this user", "must be noeviction")
    if policy != "noeviction":
        advice = "set it to noeviction (CONFIG SET and in redis.conf): an evicted key is a wrong load"
        return fail("memory", f"maxmemory-policy {policy}", advice)
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    seen = f"maxmemory-policy noeviction, {used / 2**20:,.1f} MiB used"
    if not most:
        return ok("memory", f"{seen}, no maxmemory")
    seen += f" of {most / 2**20:,.1f}"
    if used > _FULL_SHARE * most:
        return warn("memory", seen, "a full Redis refuses writes and dispatchers fall back: raise maxmemory")
    return ok("memory", seen)


def check_persistence(server: Server) -> Finding:
    """What a restart of Redis costs; never more than a warning, but for a disk that stops writes."""
    info = server.info("persistence")
    if "aof_enabled" not in info:
        return unknown("persistence", "INFO persistence is denied to this user")
    save = server.setting("save")
    # With no save points Redis does not mind a failed dump.
    statuses = ["aof_last_write_status"] + ["rdb_last_bgsave_status"] * (save != "")
    failed = [name for name in statuses if info.get(name, "ok") != "ok"]
    if failed:
        return fail(
            "persistence",
            f"the last write to disk failed ({failed[0]})",
            "Redis refuses writes after it: look at its disk",
        )
    if int(info["aof_enabled"]):
        return ok("persistence", "appendonly yes")
    seen = "appendonly no, " + ("save not visible" if save is None else f'save "{save}"')
    lost = "after a restart of Redis engines rejoin by their next report"
    if save == "":
        return warn("persistence", seen, f"{lost}; what was in flight is not counted, settings are the defaults again")
    return warn(
        "persistence",
        seen,
        f"{lost}; what was in flight is as old as the last save (with appendonly yes a second at most)",
    )


def check_cluster(server: Server) -> Finding:
    """All keys of the pool in one slot, and on this node."""
    keys = pool_keys(server.pool)
    tag = f"all {len(keys)} keys carry the hash tag {{{server.pool}}}"
    enabled = server.info("cluster").get("cluster_enabled")
    if enabled is None:
        return unknown("cluster", f"INFO cluster is denied to this user; {tag}")
    if not int(enabled):
        return ok("cluster", f"off; {tag}")
    slots = {server.ask("CLUSTER", "KEYSLOT", key) for key in keys}
    if slots == {None}:
        return unknown("cluster", f"on, CLUSTER KEYSLOT is denied to this user; {tag}")
    if len(slots) > 1:
        return fail("cluster", f"keys of the pool lie in slots {sorted(slots)}", "this is a defect: please report it")
    slot = slots.pop()
    try:
        server.store.command("EXISTS", keys[0])
    except StoreUnavailable:
        raise
    except StoreError:
        advice = "give the address of the node that serves it (CLUSTER SLOTS), or name the pool otherwise"
        return fail("cluster", f"on; the pool's slot {slot} is not served by this node", advice)
    return ok("cluster", f"on; all {len(keys)} keys in slot {slot}, on this node")


def check_scripts(server: Server) -> Finding:
    """Every script composes and compiles, and one that writes runs."""
    scripts = [load_script(name) for name in script_names()]
    loaded = {script.name: server.ask("SCRIPT", "LOAD", script.text) for script in scripts}
    wrong = [s.name for s in scripts if loaded[s.name] is not None and _text(loaded[s.name]) != s.sha]
    if wrong:
        return fail("scripts", f"{', '.join(wrong)}: another SHA1 than computed here", "is a proxy changing scripts?")
    try:
        server.store.run(release(server.pool, [_PROBE_ID]))
    except StoreUnavailable:
        raise
    except StoreDenied as error:
        advice = f"allow the user +eval +evalsha and the keys {pool_keys(server.pool)[0].rpartition(':')[0]}:*"
        return fail("scripts", str(error), advice)
    except StoreError as error:
        return fail("scripts", str(error), "scripts do not run here: is this a plain Redis or Valkey?")
    except Refused:
        pass  # it ran, and the pool's own check says what it met
    denied = [name for name, sha in loaded.items() if sha is None]
    if denied:
        return ok("scripts", f"{len(scripts)} compose and run (SCRIPT LOAD is denied to this user and not needed)")
    return ok("scripts", f"{len(scripts)} compose, load and run")


def check_rights(server: Server) -> Finding:
    """This user may run every command that the scripts use."""
    whoami = server.ask("ACL", "WHOAMI")
    user = f"user {_text(whoami)}" if whoami else "this user"
    used = sorted({c for name in script_names() for c in re.findall(r"\bcall\('([A-Z]+)'", load_script(name).text)})
    try:
        reply = server.store.command("EVAL", _ACL_QUESTION, 1, pool_keys(server.pool)[0], *used)
    except StoreUnavailable:
        raise
    except BalancerError:
        return unknown("rights", f"{user} may not ask what it may do")
    word, *denied = (_text(part) for part in reply)
    if word != "denied":
        return unknown("rights", f"{user}; this server's Lua cannot ask about them (Redis 7.0 and later can)")
    if denied:
        advice = "the scripts use them: " + " ".join(f"+{name.lower()}" for name in denied)
        return fail("rights", f"{user} may not run {', '.join(denied)} on the pool's keys", advice)
    return ok("rights", f"{user} may run all {len(used)} commands that the scripts use, on the pool's keys")


CHECKS = (
    check_version,
    check_round_trip,
    check_clock,
    check_role,
    check_memory,
    check_persistence,
    check_cluster,
    check_scripts,
    check_rights,
)
