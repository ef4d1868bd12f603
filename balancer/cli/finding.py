"""What a check of `balancer doctor` found. Pure data; made by the checks, shown by `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a check came out. Unknown: this user may not look; it fails nothing."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, how it came out, what was seen and what to do about it."""

    check: str
    result: Result
    seen: str
    advice: str = ""


def ok(check: str, seen: str) -> Finding:
    """As it should be."""
    return Finding(check, Result.OK, seen)


def warn(check: str, seen: str, advice: str) -> Finding:
    """Works, but somebody should know."""
    return Finding(check, Result.WARN, seen, advice)


def fail(check: str, seen: str, advice: str) -> Finding:
    """Does not work, or will not for long."""
    return Finding(check, Result.FAIL, seen, advice)


def unknown(check: str, seen: str, advice: str = "") -> Finding:
    """This user may not look."""
    return Finding(check, Result.UNKNOWN, seen, advice)
