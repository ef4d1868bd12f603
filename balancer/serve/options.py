"""What an operator tells a replica: its engines, its limits, whom it lets in. Pure; the command line fills it in.

An engine is given as one word, `URL[,option=value...]`:

    http://10.0.0.7:30000,kind=sglang,dp=8                  eight ranks behind one address, no hook in the engine
    http://10.0.0.7:30000,kind=sglang,dp=8,hook=engine-0    its hook reports to the pool as engine-0
    http://10.0.0.8:8000,kind=vllm,dp=8,hook=engine-1/8     ranks 8 to 15 of engine-1 (vLLM's hybrid form)
    http://10.0.0.9:8003,kind=vllm,hook=engine-1/3          one rank with an address of its own (external, multi-port)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from balancer.errors import InvalidInput
from balancer.model import MAX_RANKS, as_name, checked_count, checked_name

MIB = 1 << 20


class EngineKind(StrEnum):
    """How an engine is told the rank and the request id."""

    SGLANG = "sglang"
    VLLM = "vllm"
    OPENAI = "openai"
    """Anything else that speaks OpenAI's API: one rank for each address, nothing is added to a request."""


_HEALTH = {EngineKind.SGLANG: "/ready", EngineKind.VLLM: "/health", EngineKind.OPENAI: "/v1/models"}
"""What is cheap to ask: SGLang's /health generates a token, and waits for a second."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One address and the ranks behind it: `name`/`first` to `name`/`first + dp - 1` of the pool."""

    host: str
    port: int
    name: str
    kind: EngineKind = EngineKind.OPENAI
    dp: int = 1
    first: int = 0
    hooked: bool = False
    tls: bool = False
    health: str = "/v1/models"
    ranks: tuple[str, ...] = field(init=False, repr=False)
    """The ranks' names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(f"{self.name}/{self.first + index}" for index in range(self.dp)))

    @property
    def address(self) -> str:
        """`host:port`, as a Host header has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"{'https' if self.tls else 'http'}://{self.address}"


def parse_engine(word: str) -> Engine:
    """An engine from `URL[,kind=...][,dp=N][,hook=NAME[/FIRST]][,name=NAME][,health=/PATH]`; raises `InvalidInput`."""
    url, *parts = word.split(",")
    given = dict(part.partition("=")[::2] for part in parts)
    if unknown := given.keys() - {"kind", "dp", "hook", "name", "health"}:
        raise InvalidInput(f"--engine {word}: no option {sorted(unknown)[0]!r}: there are kind, dp, hook, name, health")
    host, port, tls = _parse_url(url, word)
    try:
        kind = EngineKind(given.get("kind", "openai"))
    except ValueError:
        raise InvalidInput(f"--engine {word}: kind must be one of {', '.join(EngineKind)}") from None
    dp = _whole(given.get("dp", "1"), f"--engine {word}: dp", 1, MAX_RANKS)
    if kind is EngineKind.OPENAI and dp > 1:
        raise InvalidInput(f"--engine {word}: only kind=sglang and kind=vllm can be told one of several ranks")
    if "hook" in given and "name" in given:
        raise InvalidInput(f"--engine {word}: name= is for an engine without a hook; hook= names one that has it")
    name, _, first_text = given.get("hook", "").partition("/")
    first = _whole(first_text or "0", f"--engine {word}: the first rank", 0, MAX_RANKS - dp)
    name = checked_name(name or given.get("name") or _name_of(host, port), f"--engine {word}: the engine's name")
    health = given.get("health", _HEALTH[kind])
    if not re.fullmatch(r"/[!-~]*", health):
        raise InvalidInput(f"--engine {word}: health must be a path such as /health")
    return Engine(host, port, name, kind, dp, first, "hook" in given, tls, health)


def checked_engines(engines: Sequence[Engine]) -> tuple[Engine, ...]:
    """Return the engines if no rank stands behind two addresses; raises `InvalidInput`."""
    seen: dict[str, Engine] = {}
    for engine in engines:
        for rank in engine.ranks:
            if rank in seen:
                raise InvalidInput(f"rank {rank} is given two addresses, {seen[rank].url} and {engine.url}")
            seen[rank] = engine
    return tuple(engines)


def _parse_url(url: str, word: str) -> tuple[str, int, bool]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidInput(f"--engine {word}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise InvalidInput(f"--engine {word}: the address must look like http://10.0.0.7:30000, without a path")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https"


def _name_of(host: str, port: int) -> str:
    """The same on every replica that is given the same address."""
    return as_name(f"{host}-{port}")[:64]


def _whole(text: str, what: str, least: int, most: int) -> int:
    if not text.isdecimal():
        raise InvalidInput(f"{what} must be a whole number, not {text!r}")
    return checked_count(int(text), what, least, most)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Times in s, sizes in bytes."""

    body: int = 64 * MIB
    bodies: int = 1024 * MIB
    """All request bodies that are held at one moment."""
    head: int = 64 * 1024
    connections: int = 20_000
    idle_s: float = 75.0
    """A connection on which nothing is asked."""
    read_s: float = 60.0
    """From a request's first byte to its last."""
    write_s: float = 60.0
    """How long an answer may wait for a client that does not read."""


@dataclass(frozen=True, slots=True)
class Options:
    """Everything about one replica but the pool's address (`balancer.settings`)."""

    engines: tuple[Engine, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    engine_key: str | None = field(default=None, repr=False)
    cert_file: str | None = None
    key_file: str | None = None
    tokenizer: str | None = None
    redis_away: str = "last_known"
    """While Redis is away: `last_known` loads, or let the `engine` choose its rank (no rank is sent)."""
    connect_s: float = 2.0
    first_byte_s: float = 600.0
    """For the first byte of an answer's body; its head alone is none."""
    stream_idle_s: float = 600.0
    """For the next byte of an answer that has begun."""
    retry_share: float = 0.2
    """Retries as a share of requests, beside a small reserve."""
    tries: int = 3
    drain_s: float = 0.0
    """How long, once the end is asked for, new requests are still served while /readyz says that it comes."""
    stop_s: float = 30.0
    show_rank: bool = False
    access_log: bool = True
    workers: int = 1
