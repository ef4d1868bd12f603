"""`python -m balancer.simulator`: the simulator by itself, as `balancer simulate` runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from balancer.errors import BalancerError
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


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what cannot be simulated."""
    try:
        return command.run(parser().parse_args(argv))
    except BalancerError as error:
        print(f"balancer simulate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
