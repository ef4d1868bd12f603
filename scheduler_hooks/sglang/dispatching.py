"""In SGLang's controller: each request gets its rank from the pool before SGLang's own method would choose one.

One EVAL for a request and one for a batch, within a few milliseconds, never retried: the controller is one thread, and
what waits here waits for all. Without an answer `routed_dp_rank` stays empty, and SGLang's own method decides. Only
ranks of this engine that SGLang holds active are asked for, so that no placement has to be taken back, and none at all
until all of them have been seen in the pool (`joined`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from balancer import BalancerError, Dispatcher, InvalidInput, NoRank, NoRankReason, Outcome, Request
from scheduler_hooks.once import Once
from scheduler_hooks.plugin import PluginSettings, harmless
from scheduler_hooks.sglang.counting import active_ranks, is_users, tokens_of
from scheduler_hooks.sglang.identity import engine_name
from scheduler_hooks.sglang.joined import Joined
from scheduler_hooks.sglang.tally import Tally
from scheduler_hooks.sglang.targets import CONTROLLER_TARGETS, not_applied

log = logging.getLogger("scheduler_hooks.sglang")

BUDGET_MS = 5
"""How long one dispatch may hold the controller, where DP_BALANCER_BUDGET_MS says nothing."""

OPENS_AFTER = 3
"""Dispatches in a row without an answer before the pool is left alone for a while: now and then one of them misses so
small a budget though Redis is well."""

_FORCED = "SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK"
_TRUE = ("true", "1", "yes", "y")  # SGLang's EnvBool


class Dispatching:
    """The hooks of one controller's process."""

    def __init__(self, plugin: PluginSettings) -> None:
        self._plugin = plugin
        self._trouble = Once(log)
        self._place = harmless(self._trouble, "placing a request")(self._place_all)
        self._dispatcher: Dispatcher | None = None
        self._engine = ""
        self._is_refused = False
        self._is_batch = False
        self._joined = Joined("")
        self._tally = Tally()
        self._reason: NoRankReason | None = None

    def ready(self, result: Any, controller: Any) -> None:
        """AFTER the controller has its dispatch table: connect, so that the first request does not wait for it."""
        harmless(self._trouble, "connecting to the pool")(self._attach)(controller)

    def one(self, original: Callable[..., Any], controller: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the dispatch of one request."""
        if not self._is_batch:
            self._place(controller, (request,))
        return original(controller, request, *args, **kwargs)

    def batch(self, original: Callable[..., Any], controller: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the dispatch of a batch: all its requests by one EVAL; `one`, called for each in it, asks no more."""
        self._place(controller, batch)
        self._is_batch = True
        try:
            return original(controller, batch, *args, **kwargs)
        finally:
            self._is_batch = False

    def _place_all(self, controller: Any, batch: Any) -> None:
        requests = [request for request in batch if request.routed_dp_rank is None and is_users(request)]
        if not requests or self._is_refused:
            return
        dispatcher = self._dispatcher or self._attach(controller)
        if dispatcher is None:
            return
        active = active_ranks(controller)
        known = _bookable(requests)
        if not active or not known:
            return
        try:
            if self._joined.lacks_any(active, dispatcher):
                self._tally.left("before all ranks were seen in the pool", len(known))
            else:
                self._ask(dispatcher, {f"{self._engine}/{index}": index for index in active}, known)
        except BalancerError:
            self._tally.left("refused by Redis", len(known))
            raise
        finally:
            self._tally.tell(dispatcher.is_falling_back)

    def _ask(self, dispatcher: Dispatcher, ranks: dict[str, int], known: list[tuple[Request, Any]]) -> None:
        answers = dispatcher.dispatch_many([booked for booked, _ in known], list(ranks))
        for (_, request), answer in zip(known, answers, strict=True):
            if isinstance(answer, NoRank):
                self._tally.left(f"without a rank ({answer.reason.value})")
                self._note(answer.reason)
            elif answer.outcome is Outcome.FALLBACK:
                self._tally.left("without an answer from Redis in time")
            else:
                request.routed_dp_rank = ranks.get(answer.rank)
                if request.routed_dp_rank is None:
                    self._tally.left("booked on another engine before")
                else:
                    self._tally.placed()

    def _note(self, reason: NoRankReason) -> None:
        if reason is not self._reason:
            self._reason = reason
            log.warning("no rank from pool %s (%s): SGLang's own method decides", self._pool, reason.value)

    def _attach(self, controller: Any) -> Dispatcher | None:
        if self._dispatcher is not None or self._is_refused:
            return self._dispatcher
        self._is_refused = True  # until it is attached: what fails once is not tried with every request
        if refusal := _refusal(controller):
            log.error("dp-balancer does not place the requests of this server: %s", refusal)
            return None
        if getattr(controller.server_args, "node_rank", 0):
            return None  # requests come in at the first node
        settings = self._plugin.settings
        self._engine = engine_name(self._plugin, controller.server_args)
        budget_ms = settings.budget_ms if os.environ.get("DP_BALANCER_BUDGET_MS") else BUDGET_MS
        self._joined = Joined(self._engine)
        self._dispatcher = Dispatcher(replace(settings, budget_ms=budget_ms, tries=1, opens_after=OPENS_AFTER))
        self._is_refused = False
        self._warm_up(self._dispatcher)
        log.info(
            "dp-balancer places the requests of engine %s by pool %s, within %d ms, else SGLang's %s does",
            self._engine,
            self._pool,
            budget_ms,
            getattr(getattr(controller, "load_balance_method", None), "name", "own method").lower(),
        )
        return self._dispatcher

    @property
    def _pool(self) -> str:
        return self._plugin.settings.pool

    @staticmethod
    def _warm_up(dispatcher: Dispatcher) -> None:
        with suppress(BalancerError):  # no Redis yet: the first request will tell
            dispatcher.snapshot()


def _bookable(requests: Sequence[Any]) -> list[tuple[Request, Any]]:
    """The requests that can be booked: an id of more than 512 bytes cannot."""
    known = []
    for request in requests:
        try:
            known.append((Request(request.rid, tokens_of(request)), request))
        except InvalidInput:
            continue
    return known


def _refusal(controller: Any) -> str:
    """Why ranks may not be chosen here, or nothing."""
    if absent := not_applied(CONTROLLER_TARGETS):
        return f"SGLang has not hooked {', '.join(absent)}"
    method = getattr(getattr(controller, "load_balance_method", None), "name", "")
    if method == "FOLLOW_BOOTSTRAP_ROOM" and os.environ.get(_FORCED, "").lower() not in _TRUE:
        return (
            "with --load-balance-method follow_bootstrap_room decode servers expect the rank that follows from a "
            "request's bootstrap room, and any other fails it; start it with --load-balance-method total_tokens "
            f"(or round_robin), or set {_FORCED}=1 on prefill and on every decode server"
        )
    return ""
