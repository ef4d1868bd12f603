"""Settings of one process, from the environment or by argument; what a whole pool agrees on is `PoolSettings` in Redis.

DP_BALANCER_URL              redis://[user:password@]host:port/db, rediss://…, unix:///path,
                             redis+sentinel://host:port,host:port/name, redis+cluster://host:port,host:port
DP_BALANCER_USERNAME         user, where the URL names none
DP_BALANCER_PASSWORD         password, where the URL names none
DP_BALANCER_PASSWORD_FILE    file with the password (its first line)
DP_BALANCER_SENTINEL_USERNAME, DP_BALANCER_SENTINEL_PASSWORD, DP_BALANCER_SENTINEL_PASSWORD_FILE
                             what sentinels ask for, where they ask for a password at all
DP_BALANCER_CA_FILE          authority that signed the server's certificate (rediss), default the system's
DP_BALANCER_CERT_FILE        our certificate, where the server asks for one
DP_BALANCER_KEY_FILE         its key
DP_BALANCER_POOL             pool, default "default"
DP_BALANCER_BUDGET_MS        how long one operation may take in all, retries included, default 100
DP_BALANCER_PROBE_MS         how often Redis is tried again while it is away, default 500
DP_BALANCER_NAME             this dispatcher's name in its bookings, default HOST-PID
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from balancer.address import Address, parse_address, redacted
from balancer.errors import InvalidInput
from balancer.model import MAX_NAME_BYTES, as_name, checked_count, checked_name

__all__ = ["Settings", "default_name", "redacted"]


def default_name() -> str:
    """HOST-PID, in the characters that a name may have."""
    host = as_name(socket.gethostname()) or "host"
    return f"{host[: MAX_NAME_BYTES - 12]}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class Settings:
    """How one process reaches Redis and which pool it serves. Units stand in the names; see the module's table."""

    url: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    pool: str = "default"
    budget_ms: int = 100
    probe_ms: int = 500
    tries: int = 4
    """Tries that fit into one budget: a silent server costs budget_ms / tries each. 1 is one try and no retry."""
    opens_after: int = 1
    """Operations in a row that must fail before Redis is taken to be away. More than 1 suits a budget that a healthy
    Redis may miss now and then; each of them costs a budget."""
    name: str = field(default_factory=default_name)

    def __post_init__(self) -> None:
        checked_name(self.pool, "pool name")
        checked_name(self.name, "dispatcher name")
        checked_count(self.budget_ms, "budget_ms", 1, 60_000)
        checked_count(self.probe_ms, "probe_ms", 1, 60_000)
        checked_count(self.tries, "tries", 1, 16)
        checked_count(self.opens_after, "opens_after", 1, 16)
        if self.url is not None:
            self.checked_address()

    def checked_address(self) -> Address:
        """The URL, read, with what stands beside it; raises `InvalidInput`."""
        if self.url is None:
            raise InvalidInput("no Redis address: set DP_BALANCER_URL, or give one (redis://host:port/0)")
        return parse_address(self.url, **{name: getattr(self, name) for name in _BESIDE_URL})

    def __repr__(self) -> str:
        url = redacted(self.url) if self.url else None
        return f"Settings(url={url!r}, pool={self.pool!r}, budget_ms={self.budget_ms}, name={self.name!r})"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: str | int | None) -> Settings:
        """Settings from DP_BALANCER_* variables; `given` arguments that are not None win.

        Raises `InvalidInput` naming the variable that is wrong.
        """
        environment = os.environ if environment is None else environment
        found: dict[str, object] = {}
        for name, convert in _VARIABLES.items():
            variable = f"DP_BALANCER_{name.upper()}"
            if text := environment.get(variable):
                try:
                    found[name] = convert(text)
                except ValueError:
                    raise InvalidInput(f"{variable} must be a whole number, not {text!r}") from None
        for name in ("password", "sentinel_password"):
            variable = f"DP_BALANCER_{name.upper()}_FILE"
            if path := environment.get(variable):
                try:
                    found.setdefault(name, Path(path).read_text(encoding="utf-8").splitlines()[0].strip())
                except (OSError, IndexError) as error:
                    raise InvalidInput(f"{variable} {path!r} has no password to read: {error}") from None
        found.update({name: value for name, value in given.items() if value is not None})
        return cls(**found)  # type: ignore[arg-type]


_BESIDE_URL = ("username", "password", "ca_file", "cert_file", "key_file", "sentinel_username", "sentinel_password")
_VARIABLES = {
    "url": str,
    **dict.fromkeys(_BESIDE_URL, str),
    "pool": str,
    "name": str,
    "budget_ms": int,
    "probe_ms": int,
}
