"""Changes of a pool's settings, checked before Redis sees them: names, words, ranges. Pure.

Takes what people and programs give (text, numbers), returns what the pool's hash stores. The defaults live in
`lua/lib/open_pool.lua`, and those of a policy's parameters in its own file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from balancer.errors import InvalidInput
from balancer.model import MAX_RANKS, checked_count, checked_name, shown
from balancer.policies import parameters
from balancer.scripts import policy_names

_MOST_MS = 7 * 24 * 3_600_000
_TIMES_MS = {"engine_lease_ms": 50, "booking_lease_ms": 50, "forget_ms": 1_000, "slow_start_ms": 0}
"""Settings in ms, with the least that each may be."""
_WORDS = {"when_silent": ("refuse", "last_known"), "when_full": ("refuse", "least_loaded")}
_MOST_OF_PARAMETER = 1_000_000
_LEAST_WEIGHT, _MOST_WEIGHT = 0.01, 100
_EQUAL = "equal"


def checked_settings(changes: Mapping[str, object]) -> dict[str, str]:
    """Changes of pool settings as Redis stores them; numbers may come as text.

    Raises `InvalidInput` naming the setting and what it may be.
    """
    if not changes:
        raise InvalidInput("nothing to configure: give at least one setting=value")
    words = {"policy": tuple(policy_names()), **_WORDS}
    checked = {}
    for name, value in changes.items():
        if name in words:
            if value not in words[name]:
                raise InvalidInput(f"{name} must be one of {', '.join(words[name])}, not {shown(value)}")
            checked[name] = str(value)
        elif name in _TIMES_MS:
            number = int(value) if isinstance(value, str) and value.isdecimal() else value
            checked[name] = str(checked_count(number, name, _TIMES_MS[name], _MOST_MS))  # type: ignore[arg-type]
        elif name == "weights":
            checked[name] = _weights(value)
        elif name in parameters():
            checked[name] = _number(value, name, 0, _MOST_OF_PARAMETER)
        else:
            known = [*words, *_TIMES_MS, "weights", *parameters()]
            raise InvalidInput(f"no setting {shown(name)}: there are {', '.join(known)}")
    return checked


def _weights(value: object) -> str:
    """`big=2,old/3=0.5`, given so or as a mapping of engine or rank to weight; `equal` for none."""
    if isinstance(value, Mapping):
        pairs = [(str(name), weight) for name, weight in value.items()]
    elif isinstance(value, str) and value:
        pairs = [] if value == _EQUAL else [_pair(word) for word in value.split(",")]
    else:
        raise InvalidInput(f"weights must be NAME=WEIGHT,... or {_EQUAL}, not {shown(value)}")
    if len(pairs) > MAX_RANKS:
        raise InvalidInput(f"weights may name {MAX_RANKS} engines and ranks at most, not {len(pairs)}")
    checked: dict[str, str] = {}
    for name, weight in pairs:
        engine, slash, index = name.partition("/")
        checked_name(engine, "engine name")
        if slash and not re.fullmatch(r"0|[1-9][0-9]{0,3}", index):
            raise InvalidInput(f"{shown(name)} is no rank: write ENGINE/INDEX, as in engine-0/3")
        if name in checked:
            raise InvalidInput(f"weights name {name} twice")
        checked[name] = _number(weight, f"weight of {name}", _LEAST_WEIGHT, _MOST_WEIGHT)
    return ",".join(f"{name}={weight}" for name, weight in checked.items()) or _EQUAL


def _pair(word: str) -> tuple[str, str]:
    name, equals, weight = word.partition("=")
    if not equals:
        raise InvalidInput(f"{shown(word)} is no weight: write ENGINE=WEIGHT or ENGINE/INDEX=WEIGHT")
    return name, weight


def _number(value: object, what: str, least: float, most: float) -> str:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise InvalidInput(f"{what} must be a number between {least:g} and {most:g}, not {shown(value)}")
    return f"{number:.6f}".rstrip("0").rstrip(".")
