"""Where a URL says that Redis is: nodes, credentials, encryption. Pure; `route` and `connection` use it.

redis://[user:password@]host[:port][/db]                  one server
rediss://…?ca_file=…&cert_file=…&key_file=…               the same over TLS; with a client certificate where given
unix://[user:password@]/path/of/socket[?db=0]             one server on this machine
redis+sentinel://[user:password@]host[:port],…/name[?db=0]   the primary that these sentinels know by this name
redis+cluster://[user:password@]host[:port],…             the node of this cluster that serves the pool's slot

The last two as rediss+… too. User and password are those of Redis; what sentinels ask for stands beside the URL only
(`sentinel_username`, `sentinel_password`). A character of theirs that means something in a URL stands there
percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from balancer.errors import InvalidInput


class Kind(Enum):
    """Who knows where the primary is: the URL itself, sentinels, or the nodes of a cluster."""

    PLAIN = ""
    SENTINEL = "+sentinel"
    CLUSTER = "+cluster"


_TLS_FILES = ("ca_file", "cert_file", "key_file")
_SENTINEL = ("sentinel_username", "sentinel_password")
_PORTS = {Kind.PLAIN: 6379, Kind.SENTINEL: 26379, Kind.CLUSTER: 6379}
_SCHEMES = ("unix", *(scheme + kind.value for kind in Kind for scheme in ("redis", "rediss")))
_URL = re.compile(r"[^:]*://(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?:#.*)?", re.DOTALL)
_NODE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\],\s]*)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class Node:
    """One server: host and port, or the path of a socket and port 0. `is_sentinel`: it holds no data."""

    host: str
    port: int
    is_sentinel: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


@dataclass(frozen=True, slots=True)
class Address:
    """A URL, read. `nodes` are those that it names: one, where `kind` is plain. `service` is the sentinels' name of the
    primary, `sentinel_username` and `sentinel_password` are what they ask for. The files are for TLS, None where the
    system's authorities do and no client certificate is shown."""

    kind: Kind
    nodes: tuple[Node, ...]
    service: str = ""
    db: int = 0
    is_tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            raise InvalidInput("a client certificate needs its key: give cert_file and key_file, or neither")
        for name in _TLS_FILES:
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise InvalidInput(f"{name} {path!r} is not there or no file")


def redacted(text: str) -> str:
    """A URL, or a text with URLs in it, without their passwords: fit for a log line."""
    text = re.sub(r"(//[^/@\s]*?):\S*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&\s'\"]*", r"\1***", text)


def parse_address(url: str, **otherwise: str | None) -> Address:
    """Read `url`; `otherwise` has username, password, ca_file, cert_file and key_file where the URL names none, and
    sentinel_username and sentinel_password, which are used where it names sentinels.

    Raises `InvalidInput` that shows the URL without its password.
    """
    try:
        return _parse(url, otherwise)
    except ValueError as error:  # InvalidInput is one
        raise InvalidInput(f"Redis address {redacted(url)!r}: {redacted(str(error))}") from None


def _parse(url: str, otherwise: dict[str, str | None]) -> Address:
    scheme, _, _ = url.partition("://")
    if scheme not in _SCHEMES:
        raise InvalidInput("it must begin with one of " + ", ".join(f"{known}://" for known in _SCHEMES))
    parts = _URL.fullmatch(url)
    assert parts, "the pattern takes all that begins with a scheme"
    kind = Kind(scheme[scheme.find("+") :] if "+" in scheme else "")
    userinfo, _, hosts = parts["netloc"].rpartition("@")
    username, _, password = (unquote(part) for part in userinfo.partition(":"))
    is_tls = scheme.startswith("rediss")
    found: dict[str, str | None] = {"username": username or None, "password": password or None}
    found.update(_query(parts["query"] or "", ("db", *(_TLS_FILES if is_tls else ()))))
    path = unquote(parts["path"])
    service = ""
    if scheme == "unix":
        nodes: tuple[Node, ...] = (Node(hosts + path, 0),)
    else:
        nodes = tuple(_nodes(hosts, kind))
        if kind is Kind.SENTINEL:
            service = path.strip("/")
            if not service:
                raise InvalidInput("its path must be the name by which the sentinels know the primary")
        elif path.strip("/"):
            found.setdefault("db", path.strip("/"))
    db = found.pop("db", None) or "0"
    if not db.isdecimal() or (kind is Kind.CLUSTER and int(db)):
        raise InvalidInput(f"database {db!r} must be a whole number, and 0 in a cluster")
    names = ("username", "password", *(_TLS_FILES if is_tls else ()), *(_SENTINEL if kind is Kind.SENTINEL else ()))
    given = {name: found.get(name) or otherwise.get(name) for name in names}
    return Address(kind, nodes, service, int(db), is_tls, **given)


def _query(query: str, known: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:  # its message shows what may be half of a password
        raise InvalidInput("what follows its ? is not NAME=VALUE (in a password, ? is written %3F)") from None
    for name, value in pairs:
        if name not in known:
            raise InvalidInput(f"nothing is called {name!r} in it: there are {', '.join(known)}")
        found[name] = value
    return found


def _nodes(hosts: str, kind: Kind) -> Iterator[Node]:
    listed = hosts.split(",")
    if kind is Kind.PLAIN and len(listed) > 1:
        raise InvalidInput("several hosts need redis+sentinel:// or redis+cluster://")
    for text in listed:
        match = _NODE.fullmatch(text)
        if not match:
            # It may be half of a password: not shown.
            raise InvalidInput("a host in it is not HOST or HOST:PORT (in a password, / is written %2F and @ %40)")
        port = int(match["port"] or _PORTS[kind])
        if not 1 <= port <= 65_535:
            raise InvalidInput(f"port {port} must be between 1 and 65535")
        yield Node(match["host"].strip("[]") or "localhost", port, is_sentinel=kind is Kind.SENTINEL)
