"""Where the mock engine meets the real hook, as an engine's adapter would: one factory, called in each rank.

It names what the mock needs of a hook and builds one. What the hook does with Redis is not its business.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from balancer import Incarnation, InvalidInput, Settings
from scheduler_hooks import StepHook
from scheduler_hooks.mock_engine import process_group

Form = Literal["gather", "leader"]


class AfterStep(Protocol):
    """What the mock needs of a hook."""

    def after_step(self, holding_tokens: int, requests: int, received_ids: Mapping[int, int]) -> None:
        """Take note of a step's outcome; called by every rank after every step."""
        ...

    def close(self) -> None:
        """End the reporting."""
        ...


@dataclass(frozen=True, slots=True)
class HookSettings:
    """How to build the hook: `settings` say where Redis is and which pool, `every` is in steps.

    `capacity_tokens` is what each rank tells the pool that it can hold, None for no limit. Raises `InvalidInput`, once
    and before the fork, for what each rank would complain of.
    """

    engine: str
    settings: Settings
    form: Form = "gather"
    every: int = 1
    capacity_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.settings.url is None:
            raise InvalidInput("no Redis address: give --redis or DP_BALANCER_URL, or --no-hook")
        Incarnation(self.engine, size=1, nonce="checked", capacity_tokens=self.capacity_tokens)


def import_early(settings: HookSettings) -> None:
    """Import before the fork what every rank would import after it."""
    if settings.form == "gather":
        process_group.import_early()


def build_hook(settings: HookSettings, rank: int, ranks: int, addresses: list[str], store: socket.socket) -> AfterStep:
    """Build the real hook for this rank; with form "gather" it waits for all ranks to do so.

    `addresses` are the ranks', for the pool to show; `store` see `process_group.join_ranks`.
    """
    if settings.form == "leader":
        return StepHook.leading(
            settings.settings,
            engine=settings.engine,
            index=rank,
            every=settings.every,
            address=addresses[rank],
            capacity_tokens=settings.capacity_tokens,
        )
    return StepHook.gathering(
        settings.settings,
        engine=settings.engine,
        size=ranks,
        rank_index=rank,
        group=process_group.join_ranks(rank, ranks, store),
        every=settings.every,
        address=addresses[0],
        capacity_tokens=settings.capacity_tokens,
    )
