"""The step hook: what an engine's adapter calls after each step, on every rank alike.

It is on the engine's step thread, so it must not raise, must not wait but for the collective itself, and must take part
in that collective at the same steps as every other process of the group, whatever it was given. It knows no engine and
no Redis: an adapter brings the counts, `intake` makes them safe, a form (`forms`) passes them on to the publisher.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from balancer import InvalidInput, Reporter, Settings
from balancer.model import checked_count
from scheduler_hooks.forms import Form, GatherForm, LeaderForm, Outlet
from scheduler_hooks.intake import MAX_WAITING_IDS, Intake
from scheduler_hooks.once import Once
from scheduler_hooks.publisher import HEARTBEAT_S, REPORT_BUDGET_MS, Publisher, checked_heartbeat
from scheduler_hooks.row import HEADER, NOBODY

log = logging.getLogger("scheduler_hooks")

IDS_PER_GATHER = 256
"""Received ids that one rank sends with one gather: 2 KB. More of them wait, and the sum stays exact (`intake`)."""

_MOST_EVERY = 1_000


class StepHook:
    """Tells the pool, after each step, what this engine holds and has received. Make one per process.

    `gathering` for engines whose ranks step together, `leading` for ranks that each report alone. `every`: pass on at
    the first step and each `every`-th after it; ids received between wait, and are in flight until then.
    """

    def __init__(self, form: Form, every: int = 1) -> None:
        self._form = form
        self._every = checked_count(every, "every", 1, _MOST_EVERY)
        self._intake = Intake()
        self._trouble = Once(log)
        self._step = 0

    @classmethod
    def gathering(
        cls,
        settings: Settings,
        *,
        engine: str,
        size: int,
        rank_index: int | None,
        group: Any = None,
        every: int = 1,
        address: str = "",
        capacity_tokens: int | None = None,
        ids_per_gather: int = IDS_PER_GATHER,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> StepHook:
        """A hook that gathers all ranks' counts at the first process of `group`, which reports them.

        Called by every process of `group` (a torch.distributed group on the CPU, None for the default one), for it is
        a collective itself: the processes compare their arguments. `engine`: its name in the pool; `size`: its number
        of ranks; `rank_index`: the rank that this process leads, None where another process leads its rank (tensor
        parallelism within a rank); `every`, `ids_per_gather`, `heartbeat_s` (seconds): see the class, IDS_PER_GATHER
        and `publisher.HEARTBEAT_S`; `address`, `capacity_tokens`: see `balancer.Incarnation`.

        Raises `InvalidInput` at every process alike when one of them was given something wrong, when they differ in
        `size`, `every` or `ids_per_gather`, or when a rank has not exactly one leader.
        """
        from scheduler_hooks.gather import TorchGather, everybodys

        plan: tuple[int, ...] = (0,) * 5
        mistake: Exception | None = None
        try:
            # At every process, for a mistake that only one of them noticed would leave the others in the collective.
            reporter = _reporter(settings, engine, size, None, address, capacity_tokens)
            checked_heartbeat(heartbeat_s)
            plan = (
                1,
                checked_count(size, "size"),
                checked_count(every, "every", 1, _MOST_EVERY),
                checked_count(ids_per_gather, "ids_per_gather", 1, MAX_WAITING_IDS),
                NOBODY if rank_index is None else checked_count(rank_index, "rank_index", 0, size - 1),
            )
        except Exception as error:
            mistake = error
        plans = everybodys(plan, group)
        if mistake is not None:
            raise mistake
        check_plans(plans)
        _, size, every, ids_per_gather, leads = plan
        gather = TorchGather(HEADER + ids_per_gather, group)
        publisher = Publisher(reporter, heartbeat_s) if gather.is_first else None
        return cls(GatherForm(gather, None if leads == NOBODY else leads, size, ids_per_gather, publisher), every)

    @classmethod
    def leading(
        cls,
        settings: Settings,
        *,
        engine: str,
        index: int,
        every: int = 1,
        address: str = "",
        capacity_tokens: int | None = None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> StepHook:
        """A hook without a collective: this process, the leader of rank `index`, reports this rank alone.

        For engines whose ranks do not step together or share no group. Arguments as in `gathering`. Raises
        `InvalidInput`.
        """
        reporter = _reporter(settings, engine, 1, index, address, capacity_tokens)
        every = checked_count(every, "every", 1, _MOST_EVERY)
        return cls(LeaderForm(Publisher(reporter, heartbeat_s)), every)

    @property
    def publisher(self) -> Outlet | None:
        """Where the counts go; None at a process that brings its row to another's publisher."""
        return self._form.outlet

    @property
    def waiting_ids(self) -> int:
        """How many received ids of this rank wait to be passed on."""
        return self._intake.waiting

    @property
    def troubles(self) -> Mapping[str, int]:
        """How often what went wrong, by kind: bad input, dropped ids. For metrics; each kind is logged once."""
        return self._intake.trouble.counts + self._trouble.counts

    def after_step(
        self,
        holding_tokens: int,
        requests: int,
        received_ids: Mapping[int, int],
        pending_tokens: int | None = None,
        kv_permille: int | None = None,
    ) -> None:
        """Take note of a step; to be called by every rank after each of its steps. Never raises.

        `holding_tokens`, `requests`: what this rank holds now, running and queued. `received_ids`: in-flight id ->
        tokens that this request added to `holding_tokens` (0 for one that is not held: rejected, or already finished),
        for what was received since the last call. `pending_tokens`, `kv_permille`: as in `balancer.RankCounts`, None
        where the engine does not know them. Bad values are replaced by the last good ones, logged once and counted. A
        process that leads no rank may give anything.
        """
        self._step += 1
        try:
            if self._form.leads:
                self._intake.take_in(holding_tokens, requests, received_ids, pending_tokens, kv_permille)
        except Exception as error:
            self._trouble.note("intake", "a step's counts are left out: %r", error, level=logging.ERROR)
        if (self._step - 1) % self._every:
            return
        try:
            self._form.pass_on(self._step, self._intake)
        except Exception as error:
            self._trouble.note("report", "a step is not reported: %r", error, level=logging.ERROR)

    def close(self) -> None:
        """Take the engine (or this rank, where it reports alone) out of the pool; waits a second at most.

        May be repeated. Steps after it still take part in the collective, for the sake of those not yet closed.
        """
        self._form.close()


def _reporter(
    settings: Settings, engine: str, size: int, index: int | None, address: str, capacity_tokens: int | None
) -> Reporter:
    budget_ms = max(settings.budget_ms, REPORT_BUDGET_MS)
    return Reporter(replace(settings, budget_ms=budget_ms), engine, size, index, address, capacity_tokens)


def check_plans(plans: list[list[int]]) -> None:
    """Raise `InvalidInput` where the processes do not agree; each reads the same plans and comes to the same end.

    A plan: 1 (0 where its arguments are wrong), size, every, ids_per_gather, rank led or NOBODY.
    """
    if not all(plan[0] for plan in plans):
        raise InvalidInput("another process of the group was given a wrong argument: its own error says which")
    for at, what in enumerate(("size", "every", "ids_per_gather"), start=1):
        if len(given := sorted({plan[at] for plan in plans})) > 1:
            raise InvalidInput(f"{what} must be the same in all processes of the group, not {given}")
    leaders = sorted(plan[4] for plan in plans if plan[4] != NOBODY)
    if leaders != list(range(plans[0][1])):
        raise InvalidInput(f"each of {plans[0][1]} ranks needs exactly one leader in the group; there are {leaders}")
