"""`balancer simulate`: policies on simulated engines. The simulator is a room of its own, found by name when asked."""

from __future__ import annotations

import argparse
from importlib import import_module

from balancer.cli.verb import Verb

_ROOM = "balancer.simulator.__main__"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rest=[])


def _run(arguments: argparse.Namespace) -> int:
    code: int = import_module(_ROOM).main(arguments.rest)
    return code


VERB = Verb(
    name="simulate",
    summary="what a policy is worth on your traffic, on simulated engines",
    details="",
    examples=("balancer simulate", "balancer simulate --requests 2000 --seeds 1"),
    add_arguments=_add_arguments,
    run=_run,
    parses_itself=True,
)
