"""`balancer doctor`: is this Redis fit for the job, and is this pool well? One line each, with advice."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing

import orjson

from balancer.cli.checks_pool import check_pool
from balancer.cli.checks_server import CHECKS, Server
from balancer.cli.exits import Exit, exit_of
from balancer.cli.finding import Finding, Result, fail, warn
from balancer.cli.table import plural
from balancer.cli.terminal import coloured
from balancer.cli.verb import Verb, add_address, add_pool, names_pool, settings_of
from balancer.errors import BalancerError, Refused, StoreDenied, StoreError, StoreUnavailable, UnknownPool
from balancer.protocol import snapshot
from balancer.store import Store

_COLOURS = {Result.OK: "green", Result.WARN: "yellow", Result.FAIL: "red", Result.UNKNOWN: "yellow"}
_RESULT_WIDTH, _CHECK_WIDTH, _WIDTH = 9, 13, 100


def examine(store: Store, pool_is_named: bool) -> Iterator[Finding]:
    """All findings, the server's first. Raises StoreUnavailable or StoreDenied where Redis does not let us in."""
    server = Server(store)
    store.command("PING")
    for check in CHECKS:
        yield check(server)
    try:
        seen = store.run(snapshot(server.pool))
    except UnknownPool as error:
        # Nobody has asked for the pool "default": that it does not exist breaks nothing.
        yield (fail if pool_is_named else warn)("pool", *_split(error))
    except Refused as error:
        yield fail("pool", *_split(error))
    except StoreUnavailable:
        raise
    except StoreError:
        pass  # the scripts' own check has said that they do not run
    else:
        yield from check_pool(seen)


def _split(error: BalancerError) -> tuple[str, str]:
    """What is wrong, and what to do: the two halves of every message."""
    wrong, _, advice = str(error).partition(": ")
    return wrong, advice


def _shown(findings: Sequence[Finding]) -> Iterator[str]:
    indent = " " * (_RESULT_WIDTH + _CHECK_WIDTH)
    for finding in findings:
        word = coloured(finding.result.value.ljust(_RESULT_WIDTH), _COLOURS[finding.result])
        yield f"{word}{finding.check.ljust(_CHECK_WIDTH)}{finding.seen}"
        if finding.advice:
            yield from textwrap.wrap(
                finding.advice, _WIDTH, initial_indent=f"{indent}> ", subsequent_indent=f"{indent}  "
            )
    counts = {result: sum(finding.result is result for finding in findings) for result in Result}
    yield ""
    yield (
        f"{counts[Result.OK]} ok, {plural(counts[Result.WARN], 'warning')}, {counts[Result.FAIL]} failed"
        + (f", {counts[Result.UNKNOWN]} unknown" if counts[Result.UNKNOWN] else "")
    )


def _as_json(findings: Sequence[Finding], server: Server) -> bytes:
    answer = {
        "redis": server.url,
        "pool": server.pool,
        "passed": not _has_failed(findings),
        "checks": [
            {"check": f.check, "result": f.result, "seen": f.seen, "advice": f.advice or None} for f in findings
        ],
    }
    return orjson.dumps(answer, option=orjson.OPT_INDENT_2)


def _has_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.result is Result.FAIL for finding in findings)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool(parser)
    add_address(parser)
    parser.add_argument("--json", action="store_true", help="JSON: redis, pool, passed, checks")


def _run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    findings: list[Finding] = []
    with closing(Store(settings)) as store:
        try:
            findings.extend(examine(store, names_pool(arguments)))
            code = Exit.BAD_ANSWER if _has_failed(findings) else Exit.OK
        except (StoreUnavailable, StoreDenied) as error:
            findings.append(fail("connection", *_split(error)))
            code = exit_of(error)
        print(_as_json(findings, Server(store)).decode() if arguments.json else "\n".join(_shown(findings)))
    return code


_DETAILS = """\
Look at Redis and at one pool, one line per check, with advice where something is
not as it should be. Changes nothing.

  server       reachable, Redis or Valkey, 6.2 or later
  round trip   how long one answer takes
  clock        distance to Redis' clock (nothing depends on it)
  role         a primary, not a replica
  memory       maxmemory-policy noeviction, and room
  persistence  what a restart of Redis costs
  cluster      all keys of the pool in one slot, on this node
  scripts      every script composes, loads and runs
  rights       this user may run what the scripts use
  pool         exists, in a schema that this release knows
  leases       of engines and bookings fit each other
  engines      somebody is up
  bookings     end by acknowledgement, not by their lease

ok, warn and unknown (this user may not look) exit with 0, a fail with 1, a Redis
that does not let us in with 3 or 4.
--json has the keys redis, pool, passed, checks [{check, result, seen, advice}]."""

VERB = Verb(
    name="doctor",
    summary="check Redis and a pool, with advice",
    details=_DETAILS,
    examples=("balancer doctor chat", "balancer doctor chat --json", "balancer doctor --url redis://10.0.0.5:6379/0"),
    add_arguments=_add_arguments,
    run=_run,
)
