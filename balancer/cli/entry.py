"""The program's edge: arguments in, exit code out. Errors become one line on stderr here, and nowhere else."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from balancer.cli.exits import Exit, exit_of
from balancer.cli.parser import build_parser, parse
from balancer.cli.terminal import complain
from balancer.errors import BalancerError
from balancer.settings import redacted

DEBUG_VARIABLE = "DP_BALANCER_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); returns its exit code."""
    try:
        code = _performed(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        # The interpreter flushes standard output once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    return int(code)


def _performed(argv: Sequence[str] | None) -> int:
    try:
        arguments = parse(argv)
        _log_to_stderr(arguments.verbose)
        if arguments.verb is None:
            build_parser().print_help(sys.stderr)
            return Exit.USAGE
        code: int = arguments.run(arguments)
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else Exit.OK
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BalancerError as error:
        _trace()
        complain(str(error))
        return exit_of(error)
    except Exception as error:
        _trace()
        complain(f"defect: {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows where; please report it)")
        return Exit.DEFECT


def _trace() -> None:
    if os.environ.get(DEBUG_VARIABLE):
        print(redacted(traceback.format_exc()), file=sys.stderr, end="")


def _log_to_stderr(verbosity: int) -> None:
    if verbosity:
        level = logging.INFO if verbosity == 1 else logging.DEBUG
        logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
