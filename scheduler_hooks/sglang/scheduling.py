"""In each of SGLang's schedulers: what its rank has received and holds, told to the pool.

Two forms. In the *leader form* each DP rank's leader reports alone, after each of its steps and, when nothing steps,
as soon as something changes. In the *gather form* all ranks' counts go to TP rank 0, which reports for the engine.

The gather follows SGLang's own: under DP attention all processes of the TP group exchange their batch sizes before each
step (`MLPSyncBatchInfo.all_gather`), the idle ones too, and SGLang itself would hang if one of them stayed away. So a
collective of ours right behind it is entered by all or by none, in every loop, and costs least, for there nobody has to
be waited for. How often it follows is decided from what that exchange gave to all alike. It is also the right moment:
what was received in this round of the loop is in the queue, and what the last step ended is gone.

Where SGLang does not exchange over exactly this engine's processes (plain DP, pipeline parallelism, elastic EP, a
SGLang told to skip it), or where some process does not take part (`agreement`), it is the leader form, and a log line.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from balancer.marker import received_ids
from scheduler_hooks.intake import MAX_WAITING_IDS
from scheduler_hooks.once import Once
from scheduler_hooks.plugin import PluginSettings, harmless
from scheduler_hooks.row import HEADER
from scheduler_hooks.sglang.agreement import ROUNDS, Agreement
from scheduler_hooks.sglang.counting import Counting, Held, led_rank, tokenized, tokens_of
from scheduler_hooks.sglang.identity import address, engine_name
from scheduler_hooks.sglang.targets import SCHEDULER_TARGETS, not_applied, numbers, version
from scheduler_hooks.step_hook import IDS_PER_GATHER, StepHook

log = logging.getLogger("scheduler_hooks.sglang")

IDLE_REPORT_S = 0.05
"""Least time between two looks at a scheduler that does not step: its idle loop spins."""

IDLE_SYNCS = 32
"""While no rank has anything to compute, each so many-th exchange is followed by a gather; these spin too."""

COUNTING_SHARE = 0.05
"""Most of a scheduler's time that counting may take. SGLang's count walks the whole waiting queue, so with thousands in
it not every step is counted; what was received meanwhile stays in flight until it is."""

CHEAP_S = 0.0005
"""Counting that takes no more CPU time than this is done at each step."""

UNREADABLE_S = 10.0
"""A rank whose counts cannot be read for so long reports no more: its last ones would draw requests for ever."""

STUCK_S = 30.0
"""A scheduler whose loop makes no round for so long takes its rank out of the pool until it does: its peer may be gone,
and SGLang's own watchdog ends such a server after 300 s. Long enough for a step that compiles."""

FIRST_RIGHT_ON_DECODE = (0, 5, 14)
"""SGLang before it counts a decode server's transferring and waiting requests twice."""

AUTO = "leader"
"""The form where DP_BALANCER_FORM does not say; the README beside this has the measurements behind it."""


_UNREAD = Held(-1, -1, -1, -1)
"""No counts: the hook keeps its last ones."""


class Scheduling:
    """The hooks of one scheduler's process."""

    def __init__(self, plugin: PluginSettings) -> None:
        self._plugin = plugin
        self._trouble = Once(log)
        self._scheduler: Any = None
        self._counting: Counting | None = None
        self._rank: int | None = None
        self._received: dict[str, int] = {}  # tokens by the engine's id
        self._compiling: set[str] = set()
        self._hook: StepHook | None = None
        self._is_gathering = False
        self._is_settled = False
        self._agreement: Agreement | None = None
        self._built: StepHook | None = None  # for the gather, until all have theirs
        self._size = 0
        self._address = ""
        self._capacity_tokens: int | None = None
        self._steps = 0
        self._next_count_s = float("-inf")
        self._idle_syncs = 0
        self._idle_cadence = IDLE_SYNCS
        self._last_look = float("-inf")
        self._last_held: Held | None = None
        self._unreadable_since: float | None = None
        self.received = harmless(self._trouble, "taking note of received requests")(self._on_received)
        self.stepped = harmless(self._trouble, "reporting a step")(self._on_step)
        self.synced = harmless(self._trouble, "gathering")(self._on_sync)
        self.idle = harmless(self._trouble, "reporting an idle rank")(self._on_idle)

    # -- the hooks; SGLang calls them on its step thread

    def _on_received(self, result: Any, scheduler: Any, messages: Any) -> None:
        """AFTER the scheduler has put a round's requests into its queue."""
        if self._scheduler is None:
            self._attach(scheduler)
        if self._counting is None or (self._is_settled and self._hook is None):
            return
        if self._hook and self._hook.publisher:
            self._hook.publisher.still_here(STUCK_S)
        if messages:
            self._received.update((request.rid, tokens_of(request)) for request in tokenized(messages))
            while len(self._received) > MAX_WAITING_IDS:  # the oldest are left to their lease
                del self._received[next(iter(self._received))]
        if self._hook and getattr(scheduler, "_engine_paused", False):
            self._on_idle(scheduler)  # SGLang's loop comes no further

    def _on_step(self, result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AFTER a step's results are in."""
        if not self._is_settled and self._agreement is None:
            self._lead("this SGLang's ranks do not exchange anything before a step")
        if self._hook and not self._is_gathering and self._is_told_step():
            self._report_alone(self._hook)

    def _on_idle(self, scheduler: Any) -> None:
        """BEFORE the scheduler's idle housekeeping, which spins or sleeps: what ended or came without a step."""
        if not self._is_settled and self._agreement is None:
            self._lead("this SGLang's ranks do not exchange anything before a step")
        if self._hook is None or self._is_gathering:
            return
        now = time.monotonic()
        if len(self._received) > len(self._compiling) or now - self._last_look >= IDLE_REPORT_S:
            self._last_look = now
            self._report_alone(self._hook, is_idle=True)

    def _on_sync(self, result: Any, info: Any, *args: Any, **kwargs: Any) -> None:
        """AFTER SGLang's own exchange. From here on nothing may depend on what only this process knows."""
        if self._is_settled and not self._is_gathering:
            return
        if not self._is_settled:
            try:
                self._settle(info, kwargs)
            except Exception as error:
                self._lead(f"agreeing on the gather failed: {error!r}")
            return
        is_busy = max(info.global_num_tokens) > 0
        self._idle_syncs = 0 if is_busy else self._idle_syncs + 1
        if self._idle_syncs > 2 and self._idle_syncs % self._idle_cadence:
            return
        assert self._hook is not None
        if not self._is_told_step():  # the same one everywhere, for all have settled at the same exchange
            return
        try:
            self._report(self._hook)
        except Exception as error:  # whatever happened, this process brings its row
            self._trouble.note("counts", "this rank's counts cannot be read: %r", error, level=logging.ERROR)
            self._hook.after_step(_UNREAD.tokens, _UNREAD.requests, {})

    # -- what they do

    def _report_alone(self, hook: StepHook, is_idle: bool = False) -> None:
        try:
            self._report(hook, is_idle)
            self._unreadable_since = None
        except Exception:
            now = time.monotonic()
            if self._unreadable_since is None:
                self._unreadable_since = now
            if now - self._unreadable_since >= UNREADABLE_S and hook.publisher:
                hook.publisher.silence()
                self._hook = None
                self._received.clear()
                log.error("dp-balancer reports %s/%s no more: its counts cannot be read", self._engine, self._rank)
            raise

    def _is_told_step(self) -> bool:
        """Counts a step; whether it is one of each `every`, the first one included."""
        self._steps += 1
        return (self._steps - 1) % self._plugin.every == 0

    def _held(self, counting: Counting) -> Held | None:
        """What the rank holds, or None where looking again so soon would cost too much."""
        if time.monotonic() < self._next_count_s:
            return None
        began = time.thread_time()
        held = counting.held()
        took_s = time.thread_time() - began
        if took_s > CHEAP_S:
            self._next_count_s = time.monotonic() + took_s / COUNTING_SHARE
        return held

    def _report(self, hook: StepHook, is_idle: bool = False) -> None:
        if self._counting is None:  # it leads no rank, and brings its row
            return hook.after_step(0, 0, {})
        held = self._held(self._counting)
        if held is None:
            if self._is_gathering:  # its row goes all the same
                last = self._last_held or _UNREAD
                hook.after_step(last.tokens, last.requests, {}, last.pending_tokens, last.kv_permille)
            return None
        self._compiling = self._received.keys() & self._counting.waiting_for_grammar()
        ready = {rid: count for rid, count in self._received.items() if rid not in self._compiling}
        if is_idle and not ready and held == self._last_held:
            return None
        self._received = {rid: self._received[rid] for rid in self._compiling}  # their tokens are in no count yet
        self._last_held = held
        received = {id_: 0 if at else count for rid, count in ready.items() for at, id_ in enumerate(received_ids(rid))}
        return hook.after_step(held.tokens, held.requests, received, held.pending_tokens, held.kv_permille)

    def _attach(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        if absent := not_applied(SCHEDULER_TARGETS):
            self._is_settled = True
            return log.error("dp-balancer reports nothing: SGLang has not hooked %s", ", ".join(absent))
        if getattr(scheduler.server_args, "ep_join_rank_offset", 0):  # from 0.5.16 on
            self._is_settled = True
            return log.error("dp-balancer reports nothing: a node that joins by elastic EP numbers its ranks from 0")
        self._rank = led_rank(scheduler)
        self._idle_cadence = 1 if getattr(scheduler.server_args, "sleep_on_idle", False) else IDLE_SYNCS
        self._address = address(self._plugin, scheduler.server_args)
        self._is_settled = self._form != "gather"
        if self._rank is not None:
            counting = Counting(scheduler)
            if counting.is_decode and (0, 0, 0) < numbers(version()) < FIRST_RIGHT_ON_DECODE:
                self._is_settled = True
                return log.error(
                    "dp-balancer reports nothing: SGLang %s counts requests of a decode server twice, 0.5.14 does not",
                    version(),
                )
            self._capacity_tokens = counting.capacity_tokens() if self._plugin.capacity else None
            self._counting = counting
        if self._is_settled:
            self._lead()
        return None

    @property
    def _form(self) -> str:
        return AUTO if self._plugin.form == "auto" else self._plugin.form

    def _settle(self, info: Any, given: dict[str, Any]) -> None:
        """Gather or lead, after four exchanges; every process of the group comes to the same answer at the same one."""
        agreement = self._agreement
        if agreement is None:
            return self._propose(info, given)
        if not agreement.is_reached():
            return self._lead("not every process of it has this plugin, with the same settings")
        if agreement.rounds == ROUNDS:
            self._hook, self._built = self._built, None
            self._is_settled = self._is_gathering = True
            if self._hook and self._hook.publisher:
                log.info(
                    "dp-balancer reports %s, %d ranks, to pool %s (gather form)", self._engine, self._size, self._pool
                )
            return None
        if agreement.rounds == ROUNDS - 1:
            self._built = StepHook.gathering(
                self._plugin.settings,
                engine=self._engine,
                size=self._size,
                rank_index=self._rank,
                group=self._scheduler.tp_cpu_group,
                address=self._address,
                capacity_tokens=self._capacity_tokens,
            )
        return agreement.speak()

    def _propose(self, info: Any, given: dict[str, Any]) -> None:
        """Say that this process will gather, or lead where SGLang's exchange is not this engine's alone."""
        from scheduler_hooks import gather

        if getattr(self._scheduler.server_args, "elastic_ep_backend", None):
            return self._lead("with elastic EP (--elastic-ep-backend) ranks come and go")
        members, everybody = gather.sizes(self._scheduler.tp_cpu_group)
        if given.get("use_all_reduce") or members != everybody:
            return self._lead("its ranks exchange over another group than this engine's tensor parallel one")
        self._size = int(getattr(info, "num_dp_ranks", 0) or getattr(info, "dp_size", 0))
        row = f"{HEADER}+{IDS_PER_GATHER}"
        cadence = f"{self._plugin.every}/{IDLE_SYNCS}/{self._idle_cadence}"
        can_count = self._rank is None or self._counting is not None
        self._agreement = Agreement(f"{self._engine}/{self._size}/{row}/{cadence}", members, gather.everybodys_store())
        return self._agreement.speak() if can_count else None

    def _lead(self, why_not_gather: str = "") -> None:
        self._is_settled = True
        if self._built:
            self._built.close()
            self._built = None
        if why_not_gather and self._rank is not None:
            log.warning("dp-balancer does not gather engine %s: %s", self._engine, why_not_gather)
        if self._rank is None or self._counting is None:
            return
        self._hook = StepHook.leading(
            self._plugin.settings,
            engine=self._engine,
            index=self._rank,
            address=self._address,
            capacity_tokens=self._capacity_tokens,
        )
        log.info("dp-balancer reports %s/%d to pool %s (leader form)", self._engine, self._rank, self._pool)

    @property
    def _engine(self) -> str:
        return engine_name(self._plugin, self._scheduler.server_args)

    @property
    def _pool(self) -> str:
        return self._plugin.settings.pool
