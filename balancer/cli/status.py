"""`balancer status`: a pool's engines and ranks at one moment of Redis' clock, as a table, live, or as JSON."""

from __future__ import annotations

import argparse
import math
from contextlib import closing
from time import sleep, strftime
from typing import Any

import orjson

from balancer.admin import PoolAdmin
from balancer.cli.exits import Exit
from balancer.cli.table import duration, number, plural, table
from balancer.cli.terminal import clear, complain, is_terminal, redraw
from balancer.cli.verb import Verb, add_address, add_pool, settings_of
from balancer.errors import BalancerError, InvalidInput
from balancer.model import EngineState, EngineView, PoolSnapshot, RankView
from balancer.settings import redacted

_LEAST_WATCH_S, _MOST_WATCH_S = 0.1, 3_600.0


def balance(snapshot: PoolSnapshot) -> tuple[int, float] | None:
    """Largest and mean load in tokens over the ranks that are up; None where none is."""
    loads = [rank.load_tokens for rank in snapshot.ranks if rank.state is EngineState.UP]
    return (max(loads), sum(loads) / len(loads)) if loads else None


def as_json(snapshot: PoolSnapshot) -> dict[str, Any]:
    """The snapshot in the keys that `balancer status --help` documents."""
    most, mean = balance(snapshot) or (None, None)
    return {
        "pool": snapshot.pool,
        "now_ms": snapshot.now_ms,
        "settings": snapshot.settings,
        "bookings": snapshot.bookings,
        "expired": snapshot.expired,
        "next_deadline_ms": snapshot.oldest_deadline_ms,
        "max_load_tokens": most,
        "mean_load_tokens": mean,
        "max_over_mean": most / mean if most and mean else None,
        "engines": [
            {
                "engine": engine.name,
                "state": engine.state,
                "epoch": engine.epoch,
                "step": engine.step,
                "ranks": engine.size,
                "draining": sorted(engine.draining),
                "age_ms": engine.age_ms,
                "address": engine.address,
            }
            for engine in snapshot.engines
        ],
        "ranks": [
            {
                "rank": rank.rank,
                "state": rank.state,
                "holding_tokens": rank.holding_tokens,
                "in_flight_tokens": rank.in_flight_tokens,
                "load_tokens": rank.load_tokens,
                "requests": rank.requests,
                "in_flight_requests": rank.in_flight_requests,
                "capacity_tokens": rank.capacity_tokens,
                "pending_tokens": rank.pending_tokens,
                "kv_permille": rank.kv_permille,
                "age_ms": rank.age_ms,
            }
            for rank in snapshot.ranks
        ],
    }


def as_text(snapshot: PoolSnapshot, url: str) -> list[str]:
    """The snapshot for a person, line by line."""
    settings = snapshot.settings
    lines = [
        f"pool      {snapshot.pool} at {url}",
        f"policy    {settings.policy}; all silent: {settings.when_silent}; all full: {settings.when_full}",
        f"leases    engine {duration(settings.engine_lease_ms)}, booking {duration(settings.booking_lease_ms)}; "
        f"forgotten after {duration(settings.forget_ms)} more",
        f"bookings  {_bookings(snapshot)}",
        f"load      {_load(snapshot)}",
        "",
    ]
    if not snapshot.engines:
        return [*lines, "no engine has joined this pool"]
    titles = ["ENGINE", "STATE", ">RANKS", ">EPOCH", ">STEP", ">REPORT", "ADDRESS"]
    lines += [*table(titles, [_engine_row(engine) for engine in snapshot.engines]), ""]
    titles = [
        "RANK",
        "STATE",
        ">HOLDING",
        ">IN FLIGHT",
        ">LOAD",
        ">REQUESTS",
        ">PENDING",
        ">KV",
        ">CAPACITY",
        ">REPORT",
    ]
    rows = [_rank_row(rank) for rank in snapshot.ranks]
    for title in (">PENDING", ">KV", ">CAPACITY"):
        at = titles.index(title)
        if all(cells[at] == "-" for cells in rows):  # no engine of this pool tells
            for cells in (titles, *rows):
                del cells[at]
    return lines + table(titles, rows)


def _bookings(snapshot: PoolSnapshot) -> str:
    counted = sum(rank.in_flight_requests for rank in snapshot.ranks)
    text = f"{number(snapshot.bookings)} in flight"
    if snapshot.bookings > counted:
        text += f" ({number(snapshot.bookings - counted)} to earlier lives of engines: they count for nobody)"
    if snapshot.oldest_deadline_ms is not None:
        left_ms = snapshot.oldest_deadline_ms - snapshot.now_ms
        text += f", the first lease ends in {duration(left_ms)}" if left_ms > 0 else ", leases have ended"
    return f"{text}; {number(snapshot.expired)} expired so far"


def _load(snapshot: PoolSnapshot) -> str:
    found = balance(snapshot)
    if found is None:
        return "no rank is up"
    most, mean = found
    ratio = f", max/mean {most / mean:.2f}" if mean else ""
    up = sum(rank.state is EngineState.UP for rank in snapshot.ranks)
    return f"max {number(most)}, mean {number(round(mean))} tokens{ratio} over {plural(up, 'rank')} up"


def _engine_row(engine: EngineView) -> list[str]:
    state = engine.state.value
    if engine.state is EngineState.UP and engine.draining:
        state += f", {len(engine.draining)} draining"
    age = f"{duration(engine.age_ms)} ago"
    return [engine.name, state, str(engine.size), str(engine.epoch), str(engine.step), age, engine.address]


def _rank_row(rank: RankView) -> list[str]:
    capacity = "-" if rank.capacity_tokens is None else number(rank.capacity_tokens)
    return [
        rank.rank,
        rank.state.value,
        number(rank.holding_tokens),
        number(rank.in_flight_tokens),
        number(rank.load_tokens),
        f"{number(rank.requests)} + {number(rank.in_flight_requests)}",
        "-" if rank.pending_tokens is None else number(rank.pending_tokens),
        "-" if rank.kv_permille is None else f"{rank.kv_permille / 10:.1f} %",
        capacity,
        f"{duration(rank.age_ms)} ago",
    ]


def _show(snapshot: PoolSnapshot, arguments: argparse.Namespace, url: str) -> None:
    watched = arguments.watch is not None
    if arguments.json:  # one line per look when watched, so that `| jq` can follow
        print(orjson.dumps(as_json(snapshot), option=0 if watched else orjson.OPT_INDENT_2).decode(), flush=True)
    elif watched and is_terminal():
        when = strftime("%H:%M:%S")
        redraw([*as_text(snapshot, url), "", f"{when}, every {arguments.watch:g} s; Ctrl-C ends"])
    else:
        print("\n".join([*as_text(snapshot, url), *([""] if watched else [])]), flush=True)


def _watch(admin: PoolAdmin, arguments: argparse.Namespace, url: str) -> int:
    """Look again and again. The first look must succeed; after it an outage is shown and waited for."""
    try:
        snapshot: PoolSnapshot | None = admin.snapshot()
        if is_terminal() and not arguments.json:
            clear()
        while True:
            if snapshot is not None:
                _show(snapshot, arguments, url)
            sleep(arguments.watch)
            snapshot = _looked_again(admin)
    except KeyboardInterrupt:
        return Exit.OK


def _looked_again(admin: PoolAdmin) -> PoolSnapshot | None:
    try:
        return admin.snapshot()
    except BalancerError as error:
        complain(str(error))
        return None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool(parser)
    add_address(parser)
    parser.add_argument(
        "--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="look again every SECONDS (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="JSON; with --watch one line per look")


def _run(arguments: argparse.Namespace) -> int:
    seconds = arguments.watch
    if seconds is not None and not (math.isfinite(seconds) and _LEAST_WATCH_S <= seconds <= _MOST_WATCH_S):
        raise InvalidInput(f"--watch must be between {_LEAST_WATCH_S:g} and {_MOST_WATCH_S:g} seconds, not {seconds:g}")
    settings = settings_of(arguments)
    url = redacted(settings.url or "")
    with closing(PoolAdmin(settings)) as admin:
        if seconds is not None:
            return _watch(admin, arguments, url)
        _show(admin.snapshot(), arguments, url)
    return Exit.OK


_DETAILS = """\
A pool's engines and ranks at one moment of Redis' clock.

  HOLDING    tokens the engine itself counted at its last report: running and queued
  IN FLIGHT  tokens dispatched that this report does not contain
  LOAD       holding + in flight: the number by which ranks are compared
  REQUESTS   held + in flight
  PENDING    of the tokens held those that no step has taken up yet: prompts that wait
  KV         how much of the rank's KV cache is in use
  REPORT     age of the last report
  STATE      up; draining (takes no new requests); silent (no report for an engine lease)

The line `load` and its keys in --json are over the ranks that are up.

--json has these keys; times in ms of Redis' clock, null for what is not known:
  pool, now_ms, bookings, expired, next_deadline_ms,
  max_load_tokens, mean_load_tokens, max_over_mean,
  settings {policy, engine_lease_ms, booking_lease_ms, forget_ms, when_silent,
            when_full, slow_start_ms, weights, parameters},
  engines  [{engine, state, epoch, step, ranks, draining, age_ms, address}],
  ranks    [{rank, state, holding_tokens, in_flight_tokens, load_tokens, requests,
             in_flight_requests, capacity_tokens, pending_tokens, kv_permille, age_ms}]"""

VERB = Verb(
    name="status",
    summary="a pool's ranks: load, requests, age of report, state",
    details=_DETAILS,
    examples=(
        "balancer status chat",
        "balancer status chat --url redis://10.0.0.5:6379/0",
        "balancer status chat --watch",
        "balancer status chat --watch 0.5 --json",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
