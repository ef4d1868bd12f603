"""The words of the project as types: requests, placements, reports, what a snapshot shows.

Pure data with its own rules (ranges, the in-flight id); imports nothing but errors. Made by callers and by
`balancer.protocol`, read by everybody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from balancer.errors import InvalidInput

MAX_TOKENS = 2**31 - 1
"""Most tokens one request may carry. Sums of them stay exact in Lua's doubles (2**53) up to four million bookings."""

MAX_COUNT = 2**40
"""Most tokens or requests a rank may report as held, and the largest capacity."""

MAX_REQUEST_ID_BYTES = 512
MAX_NAME_BYTES = 64
MAX_RANKS = 1024
"""Most ranks of one engine."""

MAX_REQUESTS_PER_DISPATCH = 256
"""Most requests in one EVAL: a script blocks the server, so a list has an end."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANK = re.compile(rf"{_NAME.pattern}/[0-9]{{1,4}}")
_ADDRESS = re.compile(r"\S{0,256}")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it may stand in a key or a rank's name, else raise `InvalidInput`."""
    if not isinstance(name, str) or len(name) > MAX_NAME_BYTES or not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} {shown(name)} must be 1 to {MAX_NAME_BYTES} characters of A-Z a-z 0-9 . _ - "
            "and begin with a letter or digit"
        )
    return name


def as_name(text: str) -> str:
    """`text` in the characters that a name may have, a dash for each other one; may be empty, or too long."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")


def checked_count(value: int, what: str, least: int = 0, most: int = MAX_COUNT) -> int:
    """Return `value` as an int within [least, most]; whole floats pass, NaN, fractions and text do not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{what} must be a whole number, not {shown(value)}")
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise InvalidInput(f"{what} must be a whole number, not {value!r}")
        value = int(value)
    if not least <= value <= most:
        raise InvalidInput(f"{what} must be between {least} and {most}, not {shown(value)}")
    return value


@dataclass(frozen=True, slots=True)
class Scope:
    """The ranks (`engine/index`) that a dispatch may choose: `among` these, or any, and never one to `avoid`."""

    among: Sequence[str] = ()
    avoid: Sequence[str] = ()

    def __post_init__(self) -> None:
        for ranks in (self.among, self.avoid):
            if isinstance(ranks, str) or len(ranks) > MAX_RANKS:
                raise InvalidInput(f"a dispatch may be restricted to a list of at most {MAX_RANKS} ranks")
            for rank in ranks:
                if not isinstance(rank, str) or not _RANK.fullmatch(rank):
                    raise InvalidInput(f"a rank is named ENGINE/INDEX, not {shown(rank)}")

    def allows(self, rank: str) -> bool:
        """Whether this rank may be chosen."""
        return rank not in self.avoid and (not self.among or rank in self.among)


def checked_request_id(request_id: str) -> str:
    """Return `request_id` if it is text of 1 to 512 bytes in UTF-8, else raise `InvalidInput`."""
    if not isinstance(request_id, str):
        raise InvalidInput(f"request id must be text, not {shown(request_id)}")
    size = len(_in_utf8(request_id, "request id"))
    if not 1 <= size <= MAX_REQUEST_ID_BYTES:
        raise InvalidInput(f"request id must have 1 to {MAX_REQUEST_ID_BYTES} bytes, not {size}")
    return request_id


def _in_utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInput(f"{what} {shown(text)} has a half character that UTF-8 cannot carry: leave it out") from None


def shown(value: object) -> str:
    """A value as an error message shows it: short, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def in_flight_id(request_id: str) -> int:
    """The 63-bit in-flight id of a request id: blake2b, cut to 63 bits.

    Dispatcher and engine each compute it from the request id that the engine carries anyway, so no new field
    has to travel; a signed 64-bit tensor can gather it. Two of a million live ids collide with p < 1e-7.
    """
    digest = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Request:
    """What a dispatcher knows of one request: its id (1 to 512 bytes) and its prompt's tokens (1 to 2**31 - 1)."""

    request_id: str
    tokens: int

    def __post_init__(self) -> None:
        checked_request_id(self.request_id)
        object.__setattr__(self, "tokens", checked_count(self.tokens, "tokens", 1, MAX_TOKENS))

    @property
    def in_flight_id(self) -> int:
        """The id under which the booking is kept."""
        return in_flight_id(self.request_id)


class Outcome(StrEnum):
    """How a placement came about."""

    PLACED = "placed"
    REPEATED = "repeated"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes.

    `rank` is `engine/index`; `load_tokens` the rank's load before this request (holding + in-flight), in tokens;
    `outcome` says whether it was placed now, repeats an earlier placement, or was chosen while Redis was away
    (then nothing is booked); `stale` that the rank's engine was silent (pool setting when_silent=last_known).
    """

    request: Request
    rank: str
    load_tokens: int
    outcome: Outcome
    stale: bool = False

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self.rank.rpartition("/")[0]

    @property
    def index(self) -> int:
        """The rank's index within its engine, from 0."""
        return int(self.rank.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of an engine, or of one of its ranks that reports alone: who writes reports.

    `engine` is the engine's name; `index` the rank's index if this rank reports alone (leader form), else None;
    `size` the number of ranks it reports (1 in the leader form); `address` what a dispatcher needs to reach it
    (free text without spaces, may be empty); `capacity_tokens` what each of its ranks can hold, None for no limit;
    `nonce` makes a repeated join harmless; `epoch` is given by Redis at the join (0 before), by its clock in ms.
    """

    engine: str
    size: int
    nonce: str
    index: int | None = None
    address: str = ""
    capacity_tokens: int | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        checked_name(self.engine, "engine name")
        checked_name(self.nonce, "nonce")
        object.__setattr__(self, "size", checked_count(self.size, "number of ranks", 1, MAX_RANKS))
        if self.index is not None:
            object.__setattr__(self, "index", checked_count(self.index, "rank index", 0, MAX_RANKS - 1))
            if self.size != 1:
                raise InvalidInput("a rank that reports alone (index given) has size 1")
        if self.capacity_tokens is not None:
            capacity = checked_count(self.capacity_tokens, "capacity in tokens", 1)
            object.__setattr__(self, "capacity_tokens", capacity)
        if not isinstance(self.address, str) or not _ADDRESS.fullmatch(self.address):
            raise InvalidInput("address must have at most 256 characters and no spaces")
        _in_utf8(self.address, "address")

    @property
    def name(self) -> str:
        """Field in the `engines` hash: the engine's name, or the rank's where it reports alone."""
        return self.engine if self.index is None else f"{self.engine}/{self.index}"

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks that this incarnation reports, in the order of its counts."""
        if self.index is not None:
            return (self.name,)
        return tuple(f"{self.engine}/{index}" for index in range(self.size))


@dataclass(frozen=True, slots=True)
class RankCounts:
    """What an engine itself counted on one rank: tokens held (running and queued) and requests held.

    From an engine that knows them also `pending_tokens`, those of the held that no step has taken up yet (prompts that
    wait, and what is left of those in chunks), and `kv_permille`, how much of its KV cache is in use, in thousandths.
    """

    holding_tokens: int
    requests: int
    pending_tokens: int | None = None
    kv_permille: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "holding_tokens", checked_count(self.holding_tokens, "holding tokens"))
        object.__setattr__(self, "requests", checked_count(self.requests, "requests"))
        if self.pending_tokens is not None:
            object.__setattr__(self, "pending_tokens", checked_count(self.pending_tokens, "pending tokens"))
        if self.kv_permille is not None:
            object.__setattr__(self, "kv_permille", checked_count(self.kv_permille, "KV usage", most=1_000))


@dataclass(frozen=True, slots=True)
class Report:
    """One write of an engine's loads: `counts` in the order of the incarnation's ranks, `received` the in-flight
    ids that these counts already contain, `step` the engine's step within its epoch (whole, rising)."""

    step: int
    counts: Sequence[RankCounts]
    received: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", checked_count(self.step, "step"))


class Reported(StrEnum):
    """What became of a report: applied, the same step again (its lease is renewed), or overtaken by a later step
    (then its received ids are taken and its counts are not)."""

    APPLIED = "applied"
    REPEATED = "repeated"
    LATE = "late"


class EngineState(StrEnum):
    """An engine's state as dispatch sees it."""

    UP = "up"
    DRAINING = "draining"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class EngineView:
    """An entry of the `engines` hash, as a snapshot shows it. Times are Redis' own, in ms."""

    name: str
    state: EngineState
    epoch: int
    step: int
    size: int
    reported_ms: int
    age_ms: int
    draining: frozenset[int]
    address: str

    @property
    def engine(self) -> str:
        """The engine's name, without the index of a rank that reports alone."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True)
class RankView:
    """A rank as a snapshot shows it. Tokens and requests; `capacity_tokens` is None where none was given,
    `pending_tokens` and `kv_permille` (see `RankCounts`) where its engine does not know them."""

    rank: str
    state: EngineState
    holding_tokens: int
    requests: int
    in_flight_tokens: int
    in_flight_requests: int
    capacity_tokens: int | None
    age_ms: int
    pending_tokens: int | None = None
    kv_permille: int | None = None

    @property
    def load_tokens(self) -> int:
        """Holding plus in-flight tokens: the number by which ranks are compared."""
        return self.holding_tokens + self.in_flight_tokens


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What all dispatchers and engines of a pool agree on; kept in Redis, changed by `configure`.

    The defaults live in `lua/lib/open_pool.lua`, since Redis writes them when the first engine joins.
    """

    policy: str
    """Rule by which a rank is chosen: a file of `lua/policies`. Default envelope."""
    engine_lease_ms: int
    """How long an engine is believed without a report. Default 5,000."""
    booking_lease_ms: int
    """How long a booking is believed without an acknowledgement. Default 60,000."""
    forget_ms: int
    """After how much further silence an engine's last counts are removed. Default 3,600,000."""
    when_silent: str
    """With no fresh engine left: refuse, or use the last_known ranks. Default refuse."""
    when_full: str
    """With room on no rank: refuse, or take the least_loaded. Default refuse."""
    slow_start_ms: int = 0
    """How long the ranks of an engine that has just joined take less than their share. Default 0."""
    weights: str = "equal"
    """How much more of the load some engines or ranks take than others: `big=2,old/3=0.5`. Default equal."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters of policies that somebody has set, by their full name: `envelope.k`."""


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """A pool at one moment of Redis' clock."""

    pool: str
    now_ms: int
    settings: PoolSettings
    engines: tuple[EngineView, ...]
    ranks: tuple[RankView, ...]
    bookings: int
    expired: int
    oldest_deadline_ms: int | None
