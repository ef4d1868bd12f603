"""What a verb is, and what verbs share: the options for the address and the pool, and how to get from them to Redis."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from balancer.errors import InvalidInput
from balancer.settings import Settings, redacted

log = logging.getLogger("balancer.cli")

BUDGET_MS = 2_000
"""A person waits longer than a request does."""


@dataclass(frozen=True, slots=True)
class Verb:
    """One word of the command line. `examples` are whole command lines; a test parses each.

    One that `parses_itself` finds all that follows it, --help included, in `arguments.rest`.
    """

    name: str
    summary: str
    details: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    parses_itself: bool = False


def verb_of(room: str, name: str, summary: str, examples: tuple[str, ...]) -> Verb:
    """A verb that lives in a room which nothing here imports: `room`, a module with `main(words) -> exit status`.

    It is found by name when asked, and parses what follows the verb itself. What it raises ends here as any error does.
    """

    def run(arguments: argparse.Namespace) -> int:
        code: int = import_module(room).main(arguments.rest)
        return code

    return Verb(name, summary, "", examples, lambda parser: parser.set_defaults(rest=[]), run, parses_itself=True)


def add_address(parser: argparse.ArgumentParser) -> None:
    """`--url`."""
    parser.add_argument(
        "--url", metavar="URL", help="Redis, as redis://[user:password@]host:port/db (default: DP_BALANCER_URL)"
    )


def add_pool_option(parser: argparse.ArgumentParser) -> None:
    """`--pool`, which every verb about a pool takes."""
    parser.add_argument("--pool", metavar="POOL", help='the pool (default: DP_BALANCER_POOL, then "default")')


def add_pool(parser: argparse.ArgumentParser) -> None:
    """POOL as the first word, or `--pool`."""
    parser.add_argument("pool_word", nargs="?", metavar="POOL", help="the pool; the same as --pool POOL")
    add_pool_option(parser)


def given_pool(arguments: argparse.Namespace) -> str | None:
    """The pool that the command line names, by word or by option."""
    word: str | None = getattr(arguments, "pool_word", None)
    option: str | None = arguments.pool
    if word is not None and option is not None and word != option:
        raise InvalidInput(f"two pools given, {word!r} and --pool {option!r}: name one")
    return word if word is not None else option


def names_pool(arguments: argparse.Namespace) -> bool:
    """Whether anybody has said which pool, here or in the environment."""
    return given_pool(arguments) is not None or bool(os.environ.get("DP_BALANCER_POOL"))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Address and pool, from the command line, then the environment; raises InvalidInput where there is no address."""
    settings = Settings.from_environment(url=arguments.url, pool=given_pool(arguments), budget_ms=BUDGET_MS)
    if settings.url is None:
        raise InvalidInput(
            "no Redis address: give --url redis://HOST:PORT/0 or set DP_BALANCER_URL"
            " (`balancer redis` starts a server for a look)"
        )
    log.info("pool %s at %s", settings.pool, redacted(settings.url))
    return settings
