"""`balancer configure`: what all dispatchers and engines of a pool agree on, shown or changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from balancer.admin import PoolAdmin
from balancer.cli.exits import Exit
from balancer.cli.table import table
from balancer.cli.verb import Verb, add_address, add_pool, settings_of
from balancer.errors import InvalidInput, UnknownPool

_HINTS = {
    "policy": "rule by which a rank is chosen: `balancer policy` lists them",
    "engine_lease_ms": "how long an engine is believed without a report",
    "booking_lease_ms": "how long a booking is believed without an acknowledgement",
    "forget_ms": "after how much further silence an engine's counts are removed",
    "when_silent": "with no fresh engine left: refuse, or use the last_known ranks",
    "when_full": "with room on no rank: refuse, or take the least_loaded",
    "slow_start_ms": "how long an engine's ranks take less than their share after it joined; 0: never",
    "weights": "how much more some take than others: ENGINE=2,ENGINE/3=0.5; or equal",
}


def parsed_changes(words: Sequence[str]) -> dict[str, str]:
    """`SETTING=VALUE` words by setting."""
    changes: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InvalidInput(f"{word!r} is no change: write SETTING=VALUE, as in policy=minimum_tokens")
        if name in changes:
            raise InvalidInput(f"{name} is given twice")
        changes[name] = value
    return changes


def _stored(admin: PoolAdmin) -> dict[str, str]:
    settings = asdict(admin.snapshot().settings)
    parameters = settings.pop("parameters")
    return {name: str(value) for name, value in settings.items()} | {
        name: f"{value:g}" for name, value in parameters.items()
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool(parser)
    parser.add_argument("words", nargs="*", metavar="SETTING=VALUE", help="without any: show the current settings")
    add_address(parser)


def _run(arguments: argparse.Namespace) -> int:
    words = arguments.words
    if "=" in (arguments.pool_word or ""):  # no pool is called so: POOL was left out
        words, arguments.pool_word = [arguments.pool_word, *words], None
    changes = parsed_changes(words)
    settings = settings_of(arguments)
    with closing(PoolAdmin(settings)) as admin:
        if not changes:
            rows = [[name, value, _HINTS.get(name, "")] for name, value in _stored(admin).items()]
            print("\n".join([f"pool {settings.pool}", *table(["SETTING", "VALUE", "MEANING"], rows)]))
            return Exit.OK
        try:
            before = _stored(admin)
        except UnknownPool:
            before = {}
        admin.configure(**changes)
        after = _stored(admin)
    if not before:
        print(f"pool {settings.pool} is new: it begins with the defaults and these changes")
    for name in changes:
        was = f" (was {before[name]})" if before.get(name, after[name]) != after[name] else ""
        print(f"{name}={after[name]}{was}")
    return Exit.OK


_DETAILS = """\
Show or change the settings of a pool. They live in Redis and hold for all its
dispatchers and engines from their next operation on. A pool that does not exist
yet begins with the defaults and the changes given.

settings (times in ms):
"""

VERB = Verb(
    name="configure",
    summary="show or change what a whole pool agrees on",
    details=_DETAILS + "\n".join(f"  {name:17} {hint}" for name, hint in _HINTS.items()),
    examples=(
        "balancer configure chat",
        "balancer configure chat policy=round_robin",
        "balancer configure chat engine_lease_ms=3000 when_silent=last_known",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
