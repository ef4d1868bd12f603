"""What the engine plugins share: their environment, and the promise that no hook of ours fails an engine.

Beside the variables of `balancer.settings` (DP_BALANCER_URL switches a plugin on; without it, it does nothing):

DP_BALANCER_ENGINE       this engine's name in the pool, default HOST-PORT or what the adapter knows better
DP_BALANCER_ADDRESS      where dispatchers outside reach this engine, shown by `balancer status`
DP_BALANCER_HOOK         0: do not report loads (default 1)
DP_BALANCER_DISPATCH     0: do not choose ranks inside the engine (each adapter says its default)
DP_BALANCER_FORM         gather, leader or auto (default): see the adapter
DP_BALANCER_EVERY        report at each N-th step, default 1
DP_BALANCER_CAPACITY     1: a rank's KV cache is its capacity, beyond which it is full (default 0: requests may queue)
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from balancer import InvalidInput, Settings
from balancer.model import checked_count, checked_name
from scheduler_hooks.once import Once

FORMS = ("auto", "gather", "leader")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """A plugin's environment, read once per process; `None` means that the adapter decides."""

    settings: Settings
    engine: str | None = None
    address: str = ""
    hook: bool = True
    dispatch: bool | None = None
    form: str = "auto"
    every: int = 1
    capacity: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> PluginSettings | None:
        """None where DP_BALANCER_URL is not set. Raises `InvalidInput` naming the variable that is wrong."""
        environment = os.environ if environment is None else environment
        if not environment.get("DP_BALANCER_URL"):
            return None
        engine = environment.get("DP_BALANCER_ENGINE") or None
        form = environment.get("DP_BALANCER_FORM") or "auto"
        if form not in FORMS:
            raise InvalidInput(f"DP_BALANCER_FORM must be one of {', '.join(FORMS)}, not {form!r}")
        try:
            every = int(environment.get("DP_BALANCER_EVERY") or 1)
        except ValueError:
            raise InvalidInput("DP_BALANCER_EVERY must be a whole number of steps") from None
        return cls(
            settings=Settings.from_environment(environment),
            engine=None if engine is None else checked_name(engine, "DP_BALANCER_ENGINE"),
            address=environment.get("DP_BALANCER_ADDRESS", ""),
            hook=_switch(environment, "DP_BALANCER_HOOK") is not False,
            dispatch=_switch(environment, "DP_BALANCER_DISPATCH"),
            form=form,
            every=checked_count(every, "DP_BALANCER_EVERY", 1, 1_000),
            capacity=_switch(environment, "DP_BALANCER_CAPACITY") is True,
        )


def _switch(environment: Mapping[str, str], variable: str) -> bool | None:
    text = environment.get(variable)
    if not text:
        return None
    if text not in ("0", "1"):
        raise InvalidInput(f"{variable} must be 0 or 1, not {text!r}")
    return text == "1"


def harmless(trouble: Once, what: str) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """A decorator: what goes wrong inside is noted once (and counted) instead of raised, and the answer is None."""

    def wrap(function: Callable[P, R]) -> Callable[P, R | None]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                trouble.note(what, f"{what} failed, the engine goes on without: %r", error, level=logging.ERROR)
                return None

        return guarded

    return wrap
