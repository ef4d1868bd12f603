"""`balancer version`."""

from __future__ import annotations

import argparse
from importlib import metadata

from balancer.cli.exits import Exit
from balancer.cli.verb import Verb


def program_version() -> str:
    """`balancer 1.2.3`, as installed."""
    try:
        return f"balancer {metadata.version('dp-balancer')}"
    except metadata.PackageNotFoundError:
        return "balancer, version unknown: dp-balancer is not installed, only on the path"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _run(arguments: argparse.Namespace) -> int:
    print(program_version())
    return Exit.OK


VERB = Verb(
    name="version",
    summary="print the version",
    details="Print the version of dp-balancer, as --version does.",
    examples=("balancer version",),
    add_arguments=_add_arguments,
    run=_run,
)
