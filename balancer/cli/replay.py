"""`balancer replay`: policies live on a mock engine. It lives with the hooks, which nothing here imports; found by name
when asked."""

from __future__ import annotations

import argparse
from importlib import import_module

from balancer.cli.verb import Verb

_ROOM = "scheduler_hooks.replay.__main__"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rest=[])


def _run(arguments: argparse.Namespace) -> int:
    code: int = import_module(_ROOM).main(arguments.rest)
    return code


VERB = Verb(
    name="replay",
    summary="policies live on a mock engine, the simulator beside them",
    details="",
    examples=("balancer replay", "balancer replay --requests 60 --rounds 1 --policy minimum_tokens --ranks 4"),
    add_arguments=_add_arguments,
    run=_run,
    parses_itself=True,
)
