"""`balancer demo`: the main job. It lives with the hooks, which nothing here imports; found by name when asked."""

from __future__ import annotations

import argparse
from importlib import import_module

from balancer.cli.verb import Verb

_ROOM = "scheduler_hooks.demo.__main__"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rest=[])


def _run(arguments: argparse.Namespace) -> int:
    code: int = import_module(_ROOM).main(arguments.rest)
    return code


VERB = Verb(
    name="demo",
    summary="the main job: a mock engine, several dispatchers, one table",
    details="",
    examples=("balancer demo", "balancer demo --quick"),
    add_arguments=_add_arguments,
    run=_run,
    parses_itself=True,
)
