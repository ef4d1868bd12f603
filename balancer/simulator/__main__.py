"""`python -m balancer.simulator`, which is `balancer simulate`: errors and exit codes are the command line's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from balancer.cli import main as command_line
from balancer.simulator import command


def parser() -> argparse.ArgumentParser:
    """The parser of all options."""
    made = argparse.ArgumentParser(
        prog="balancer simulate",
        description=command.DETAILS,
        epilog="\n  ".join(["examples:", *command.EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(made)
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run the simulation. Raises BalancerError."""
    return command.run(parser().parse_args(words))


if __name__ == "__main__":
    sys.exit(command_line(["simulate", *sys.argv[1:]]))
