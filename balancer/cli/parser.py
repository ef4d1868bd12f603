"""The list of verbs and the help that makes a manual unnecessary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from balancer import settings
from balancer.cli import (
    configure,
    demo,
    doctor,
    drain,
    policy,
    redis_server,
    replay,
    script,
    serve,
    simulate,
    status,
    version,
)
from balancer.cli.exits import MEANINGS
from balancer.cli.verb import Verb
from balancer.errors import InvalidInput

VERBS: tuple[Verb, ...] = (
    demo.VERB,
    serve.VERB,
    status.VERB,
    drain.DRAIN,
    drain.UNDRAIN,
    configure.VERB,
    policy.VERB,
    doctor.VERB,
    script.VERB,
    redis_server.VERB,
    simulate.VERB,
    replay.VERB,
    version.VERB,
)

_DESCRIPTION = """\
One exact, shared view of every data-parallel rank's load: look at a pool, steer
it, check its Redis.
`balancer VERB --help` explains a verb, with examples."""

_POOL_RULE = """\
which pool:
  Every verb about a pool takes --pool POOL; status, configure, policy and doctor
  also take it as their first word. Without either: DP_BALANCER_POOL, then "default"."""

_FURTHER_VARIABLES = """\
DP_BALANCER_REDIS_SERVER     server program that `redis` and `demo` start
DP_BALANCER_API_KEY          `serve`: the key that clients bring
DP_BALANCER_ENGINE_KEY       `serve`: the key that it brings to engines
DP_BALANCER_DEBUG            1: errors with their traceback
NO_COLOR                     no colour on a terminal"""

_IN_ENGINES = """\
environment of the plugins in engines, beside the Redis and the pool above
(scheduler_hooks/sglang/README.md and vllm/README.md explain it):
  DP_BALANCER_ENGINE, DP_BALANCER_ADDRESS, DP_BALANCER_HOOK, DP_BALANCER_DISPATCH,
  DP_BALANCER_FORM, DP_BALANCER_EVERY, DP_BALANCER_CAPACITY"""


class _Parser(argparse.ArgumentParser):
    """Complains as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        """Raise InvalidInput, which ends in one line and exit code 2."""
        raise InvalidInput(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `verb` is None where none is given."""
    parser = _Parser(
        prog="balancer",
        description=_DESCRIPTION,
        epilog="\n\n".join((_POOL_RULE, _environment(), _IN_ENGINES, _exit_codes(), _examples(VERBS, most=1))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version.program_version())
    _add_verbose(parser, default=0)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in VERBS:
        made = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.details,
            epilog=_examples([verb]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=not verb.parses_itself,
            allow_abbrev=False,
        )
        made.set_defaults(run=verb.run)
        verb.add_arguments(made)
        if not verb.parses_itself:
            _add_verbose(made, default=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. Raises InvalidInput; --help and --version end in SystemExit."""
    arguments, rest = build_parser().parse_known_args(argv)
    if "rest" in arguments:
        arguments.rest = rest
    elif "words" in arguments and not any(word.startswith("-") for word in rest):
        # argparse takes a list of words once; what follows an option (`configure chat --url U a=b`) it leaves over.
        arguments.words += rest
    elif rest:
        raise InvalidInput(f"unrecognized arguments: {' '.join(rest)} (see `balancer {arguments.verb} --help`)")
    return arguments


def _add_verbose(parser: argparse.ArgumentParser, default: Any) -> None:
    # SUPPRESS in a verb's parser: its default would overwrite a -v given before the verb.
    parser.add_argument(
        "-v", "--verbose", action="count", default=default, help="say on stderr what is done; -vv: in detail"
    )


def _examples(verbs: Sequence[Verb], most: int | None = None) -> str:
    return "\n  ".join(["examples:", *(example for verb in verbs for example in verb.examples[:most])])


def _exit_codes() -> str:
    return "\n  ".join(["exit codes:", *(f"{code:<4} {meaning}" for code, meaning in MEANINGS.items())])


def _environment() -> str:
    # The table in balancer.settings is the one description of these variables.
    table = (settings.__doc__ or "").partition("\n\n")[2].strip()
    return "\n  ".join(
        [
            "environment (BUDGET_MS, PROBE_MS and NAME are for dispatchers):",
            *table.splitlines(),
            *_FURTHER_VARIABLES.splitlines(),
        ]
    )
