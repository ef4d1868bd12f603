"""The desk: what a request needs of its replica. Where it may go, its booking, its tokens, another try, the counts.

`replica` opens the doors before it; `exchange` and `decision` are what is done at it.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Set
from dataclasses import dataclass, replace

from balancer.errors import NoRank, NoRankReason
from balancer.model import MAX_RANKS, Placement
from balancer.serve.bookings import Bookings
from balancer.serve.metrics import Metrics
from balancer.serve.options import Engine, EngineKind, Options
from balancer.serve.retries import RetryBudget
from balancer.serve.stand_in import StandIn
from balancer.serve.tokens import TokenCounter
from balancer.serve.upstream_pool import Pool
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")


@dataclass(slots=True)
class Target:
    """An engine, the way to it, and whether it answers."""

    engine: Engine
    pool: Pool
    stand_in: StandIn


class Desk:
    """What all requests of one replica share. Belongs to one event loop."""

    def __init__(self, options: Options, settings: Settings) -> None:
        self.options, self.settings = options, settings
        self.metrics = Metrics(settings.pool)
        self.tokens = TokenCounter(options.tokenizer)
        self.retries = RetryBudget(options.retry_share)
        self.targets = [self._target(engine) for engine in options.engines]
        self._by_rank = {
            rank: (target, index) for target in self.targets for index, rank in enumerate(target.engine.ranks)
        }
        self.bookings = Bookings(settings, frozenset(self._by_rank))
        # Only SGLang's hook knows a request by the id in its body; elsewhere two clients may send one and the same.
        self.takes_rids = any(engine.hooked and engine.kind is EngineKind.SGLANG for engine in options.engines)
        self._strangers: tuple[str, ...] = ()
        self._seen_ranks: frozenset[str] = frozenset()
        self._turn = 0

    def _target(self, engine: Engine) -> Target:
        tls = ssl.create_default_context() if engine.tls else None
        pool = Pool(engine, self.options.connect_s, tls)
        # Not on the way of a request: an engine's report may take longer than a placement.
        patient = replace(self.settings, budget_ms=max(self.settings.budget_ms, 1_000))
        return Target(engine, pool, StandIn(engine, pool, patient))

    async def place(self, request_id: str, tokens: int, failed: tuple[str, ...] = ()) -> tuple[Placement, Target, int]:
        """A rank for a request, booked: the placement, its engine and the rank's index behind that address. Not one of
        `failed`. Raises what `Bookings.place` and `among` do."""
        began = time.monotonic()
        for _ in range(2):
            placement = await self.bookings.place(request_id, tokens, self.among(failed))
            if placement.rank in self._by_rank:
                self.metrics.observe(self.metrics.dispatch, time.monotonic() - began)
                self.metrics.policy = self.bookings.policy
                return placement, *self._by_rank[placement.rank]
            # A rank of an engine that this desk was not told of: see which others there are.
            await self.bookings.end_now(request_id)
            await self.bookings.look()
        raise NoRank(self.settings.pool, NoRankReason.ALL_SILENT)

    def among(self, failed: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The ranks to which a request may go that has `failed` on these; none are named where it may go to any in the
        pool. Raises `NoRank` where none is left.

        They are named, instead of forbidding the others, so that the reason why there is no rank is theirs.
        """
        targets = self._left(failed)
        if len(targets) == len(self.targets) and not self._strangers_in(self.bookings.ranks):
            return ()
        ranks = tuple(rank for target in targets for rank in target.engine.ranks)
        return ranks if len(ranks) <= MAX_RANKS else ()  # more cannot be named: who meets a dead one tries another

    def _left(self, failed: tuple[str, ...]) -> list[Target]:
        """Engines for a request that has `failed` on these ranks, but those that this replica cannot reach; where these
        are all, it takes none for lost: a wrong look must not turn everybody away. Raises `NoRank`."""
        untried = self.targets
        if failed:
            untried = [target for target in untried if target.engine.ranks[0] not in failed]
        if not untried:
            raise NoRank(self.settings.pool, NoRankReason.ALL_SILENT)
        return [target for target in untried if target.stand_in.answers] or untried

    def _strangers_in(self, ranks: frozenset[str]) -> tuple[str, ...]:
        """Ranks of engines that this replica was not told of."""
        if ranks is not self._seen_ranks:
            self._seen_ranks = ranks
            strangers = tuple(sorted(ranks - self._by_rank.keys()))
            if strangers and strangers != self._strangers:
                listed = ", ".join(strangers[:8])
                log.warning("pool=%s ranks without an --engine here are avoided: %s", self.settings.pool, listed)
            self._strangers = strangers
        return self._strangers

    def any_target(self, failed: tuple[str, ...]) -> Target:
        """An engine for a request that is not placed, in turn; raises `NoRank` where all have failed."""
        left = self._left(failed)
        self._turn += 1
        return left[self._turn % len(left)]

    def has_other(self, failed: Set[str]) -> bool:
        """Whether there is another engine to try than those of these ranks."""
        return any(target.stand_in.answers and target.engine.ranks[0] not in failed for target in self.targets)

    def has_untried(self, failed: Set[str]) -> bool:
        """Whether there is one at all, be it that it has not answered lately."""
        return len(failed) < len(self._by_rank)

    def close_kept(self) -> bool:
        """End engines' connections that are kept for later, where open files have run out; whether there were any."""
        return sum(target.pool.close() for target in self.targets) > 0
