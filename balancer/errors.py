"""Every error the project raises on purpose: one small tree, so that callers can catch as widely as they like.

    BalancerError
    ├── InvalidInput          the caller's argument is wrong; nothing was written
    ├── NoRank                the pool has no rank to give, and says which of the reasons it is
    ├── Refused               the state in Redis contradicts the call; nothing was written
    │   ├── UnknownPool
    │   ├── Fenced            a newer incarnation of the engine has joined
    │   ├── WrongSize         an engine's number of ranks is not the one it joined with
    │   ├── NewerSchema       the pool was written by a newer release
    │   └── CorruptPool       the pool's keys hold something that this project did not write
    └── StoreError            Redis did not do what it was asked
        ├── StoreUnavailable  no answer within the budget, or "not now"; worth another try later
        └── StoreDenied       wrong password, missing permission, wrong certificate: a person must act

Foreign exceptions (redis, socket, ssl) are translated to these in `balancer.connection`, for `balancer.store`.
"""

from __future__ import annotations

from enum import StrEnum


class BalancerError(Exception):
    """Root of the tree."""


class InvalidInput(BalancerError, ValueError):
    """An argument is out of its range or of the wrong kind. The message says which, and what would be right."""


class NoRankReason(StrEnum):
    """Why a pool has no rank to give."""

    NOBODY_JOINED = "nobody_joined"
    ALL_SILENT = "all_silent"
    ALL_DRAINING = "all_draining"
    ALL_FULL = "all_full"
    UNREACHABLE = "unreachable"


_ADVICE = {
    NoRankReason.NOBODY_JOINED: "no engine whose ranks may be chosen has joined this pool: "
    "check the pool's name and that the engine's hook runs",
    NoRankReason.ALL_SILENT: "every engine's lease has ended: engines or their way to Redis are down "
    "(to use the last known ranks all the same: when_silent=last_known)",
    NoRankReason.ALL_DRAINING: "every rank that reports is draining: `balancer undrain` one",
    NoRankReason.ALL_FULL: "the request fits into no rank's capacity now: retry later "
    "(to place it on the least loaded rank all the same: when_full=least_loaded)",
    NoRankReason.UNREACHABLE: "Redis is away and this dispatcher has not yet seen any rank to fall back to",
}


class NoRank(BalancerError):
    """No rank can be given. `reason` says why; the request is not booked."""

    def __init__(self, pool: str, reason: NoRankReason) -> None:
        super().__init__(f"pool {pool!r} has no rank to give ({reason.value}): {_ADVICE[reason]}")
        self.pool = pool
        self.reason = reason


class Refused(BalancerError):
    """The state in Redis contradicts the call. Nothing was written."""


class UnknownPool(Refused):
    """No such pool in this Redis."""


class Fenced(Refused):
    """A newer incarnation of this engine has joined; this one's reports are refused from now on."""


class WrongSize(Refused):
    """An engine's number of ranks is not the one that it joined with."""


class NewerSchema(Refused):
    """The pool was written by a newer release than this one."""


class CorruptPool(Refused):
    """A key of the pool holds a foreign type or value."""


class StoreError(BalancerError):
    """Redis did not do what it was asked."""


class StoreUnavailable(StoreError):
    """No answer within the time budget, or Redis said "not now" (loading, read-only, out of memory, cluster down)."""


class StoreDenied(StoreError):
    """Redis refused who we are or what we asked for: password, ACL, certificate."""
