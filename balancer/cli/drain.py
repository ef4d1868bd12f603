"""`balancer drain` and `balancer undrain`: take an engine, or one of its ranks, out of dispatch, and put it back."""

from __future__ import annotations

import argparse
from contextlib import closing
from functools import partial

from balancer.admin import PoolAdmin
from balancer.cli.exits import Exit
from balancer.cli.table import plural
from balancer.cli.terminal import complain
from balancer.cli.verb import Verb, add_address, add_pool_option, settings_of
from balancer.errors import InvalidInput


def parsed_target(text: str) -> tuple[str, int | None]:
    """`ENGINE` or `ENGINE/RANK` as name and index."""
    engine, slash, index = text.partition("/")
    if not slash:
        return engine, None
    if not (index.isascii() and index.isdecimal()):
        raise InvalidInput(f"{text!r} is neither ENGINE nor ENGINE/RANK: a rank is its index, as in {engine}/3")
    return engine, int(index)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="ENGINE[/RANK]", help="an engine, or one rank of it by index")
    add_pool_option(parser)
    add_address(parser)


def _run(arguments: argparse.Namespace, verb: str) -> int:
    settings = settings_of(arguments)
    engine, index = parsed_target(arguments.target)
    with closing(PoolAdmin(settings)) as admin:
        admin.snapshot()  # tells an unknown pool from an unknown engine
        eligible = admin.drain(engine, index) if verb == "drain" else admin.undrain(engine, index)
    print(f"{verb}ed {arguments.target}: pool {settings.pool} now has {plural(eligible, 'rank')} to give")
    if not eligible:
        complain(f"no request can be placed in pool {settings.pool} now")
    return Exit.OK


_DETAILS = """\
No new requests for an engine, or one of its ranks. What it holds and what is in
flight to it stays and is served; `balancer status` shows when it is empty. A new
life of the engine (a restart) begins undrained. Repeating changes nothing."""

DRAIN = Verb(
    name="drain",
    summary="no new requests for an engine or one of its ranks",
    details=_DETAILS,
    examples=("balancer drain engine-0 --pool chat", "balancer drain engine-0/3 --pool chat"),
    add_arguments=_add_arguments,
    run=partial(_run, verb="drain"),
)

UNDRAIN = Verb(
    name="undrain",
    summary="new requests again",
    details="New requests again for an engine, or one of its ranks. Repeating changes nothing.",
    examples=("balancer undrain engine-0 --pool chat", "balancer undrain engine-0/3 --pool chat"),
    add_arguments=_add_arguments,
    run=partial(_run, verb="undrain"),
)
