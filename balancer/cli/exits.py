"""Exit codes: what each means, and which error ends in which. Scripts rely on them: to change one is to break them."""

from __future__ import annotations

from enum import IntEnum

from balancer.embedded import EmbeddedServerError
from balancer.errors import BalancerError, InvalidInput, Refused, StoreDenied, StoreError, StoreUnavailable


class Exit(IntEnum):
    """How the program ended."""

    OK = 0
    BAD_ANSWER = 1
    USAGE = 2
    UNREACHABLE = 3
    DENIED = 4
    REFUSED = 5
    DEFECT = 70
    INTERRUPTED = 130


MEANINGS = {
    Exit.OK: "done; doctor: nothing failed (there may be warnings)",
    Exit.BAD_ANSWER: "the answer is bad: doctor found a failure, the demo did not come out",
    Exit.USAGE: "an argument is missing or wrong; no Redis address; no such engine or rank",
    Exit.UNREACHABLE: "Redis is unreachable or not available, or none could be started",
    Exit.DENIED: "Redis refused us: password, user, ACL, certificate, command",
    Exit.REFUSED: "the pool refused: unknown, keys of a foreign type, a newer schema",
    Exit.DEFECT: "a defect in balancer itself",
    Exit.INTERRUPTED: "Ctrl-C (but 0 where it is the way to end: --watch, redis)",
}

_BY_ERROR = (
    (InvalidInput, Exit.USAGE),
    (EmbeddedServerError, Exit.UNREACHABLE),
    (StoreUnavailable, Exit.UNREACHABLE),
    (StoreDenied, Exit.DENIED),
    (StoreError, Exit.DENIED),
    (Refused, Exit.REFUSED),
)


def exit_of(error: BalancerError) -> Exit:
    """The exit code that an error ends in."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), Exit.BAD_ANSWER)
