"""A dispatch among some ranks, or on any but some: it keeps to them, and reads what it has to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import redis

from balancer import Dispatcher, NoRank, NoRankReason, Placement, RankCounts, Reporter, Request, protocol
from balancer.admin import PoolAdmin
from balancer.model import Scope
from balancer.policies import policies
from tests.clock import Clock

Join = Callable[..., Reporter]
Run = Callable[..., Any]


def test_a_dispatch_among_ranks_looks_at_these_alone(join: Join, dispatcher: Dispatcher) -> None:
    join("a", 3).report(1, [RankCounts(500, 1), RankCounts(400, 1), RankCounts(300, 1)])
    join("b", 2).report(1, [RankCounts(0, 0), RankCounts(10, 1)])
    ranks = ["a/0", "a/1", "a/2", "stranger/0"]
    placement = dispatcher.dispatch("r0", 50, among=ranks)
    assert (placement.rank, placement.load_tokens) == ("a/2", 300)
    assert dispatcher.dispatch("r1", 60, among=ranks, avoid=["a/2"]).rank == "a/1"
    assert dispatcher.dispatch("r2", 1, avoid=["b/0"]).rank == "b/1"
    assert dispatcher.dispatch("r0", 50, among=["b/0"]).rank == "a/2", "what is booked keeps its rank"


@pytest.mark.parametrize("policy", policies())
def test_every_policy_keeps_to_the_ranks_that_it_is_given(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    join("a", 4), join("b", 4)
    seen = Counter[str]()
    for number in range(40):
        requests = [Request(f"{number}-{place}", 1 + place) for place in range(1 + number % 3)]
        answers = dispatcher.dispatch_many(requests, among=[f"b/{i}" for i in range(4)], avoid=["b/1"])
        seen.update(answer.rank for answer in answers if isinstance(answer, Placement))
        dispatcher.release(*(request.request_id for request in requests))
    assert set(seen) == {"b/0", "b/2", "b/3"}, "and ties within them spread"


def calls(client: redis.Redis, command: str) -> int:
    """How often scripts have called a command since the statistics began."""
    return int(client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.mark.parametrize("policy", policies())
def test_who_names_all_ranks_gets_what_who_names_none_gets_by_the_short_way_and_by_the_general_one(
    join: Join, run: Run, admin: PoolAdmin, client: redis.Redis, policy: str
) -> None:
    everyone = Scope(["stranger/0", "gone/0", *(f"e/{index}" for index in reversed(range(8))), "e/3"])
    answers, went_short, settled_ties = [], [], []
    for scope, wants_loads in product((Scope(), everyone), (False, True)):
        admin.remove()
        admin.configure(policy=policy)
        engine, source, placed = join("e", 8), random.Random(policy), []
        join("gone", 2), admin.drain("gone")
        client.config_resetstat()
        for step in range(1, 30):  # few different counts, many ties
            engine.report(step, [RankCounts(9_000 * source.randrange(5), source.randrange(4)) for _ in range(8)])
            for at in range(8):
                request = Request(f"{step}-{at}", source.choice((50, 900, 4_000, 30_000)))
                placed += run(protocol.dispatch("p", "d", [request], wants_loads, scope)).outcomes
        answers.append(placed)
        went_short.append(calls(client, "hsetnx"))  # as the general way never books
        settled_ties.append(calls(client, "zcount"))  # as minimum_tokens does, but not among some ranks
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert went_short[0] == went_short[2], "as often, whether all are named or none"
    assert went_short[1] == went_short[3] == 0, "who wants the loads takes the general way"
    assert (went_short[0] > 29 * 8 / 2) == (policy in ("minimum_tokens", "envelope", "pending_envelope"))
    assert settled_ties[0] == settled_ties[2]
    assert settled_ties[1] == settled_ties[3]


@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("weights", ["equal", "b=2,b/1=0.5"])
def test_the_loads_of_a_few_named_ranks_are_read_alone_and_decide_as_in_a_look_at_all(
    join: Join, run: Run, admin: PoolAdmin, client: redis.Redis, policy: str, weights: str
) -> None:
    few = Scope([f"b/{index}" for index in range(4)], ["b/3"])
    many = Scope(
        [*few.among, *(f"stranger/{index}" for index in range(4))], few.avoid
    )  # too many to be looked at alone
    answers, looked_up = [], []
    for scope in (few, many):
        admin.remove()
        admin.configure(policy=policy, weights=weights, when_full="least_loaded")
        source, placed = random.Random(policy), []
        engines = [join(name, 4, capacity_tokens=60_000) for name in "abcd"]
        client.config_resetstat()
        for step in range(1, 20):
            for engine in engines:
                engine.report(step, [RankCounts(9_000 * source.randrange(5), source.randrange(4)) for _ in range(4)])
            for at, size in enumerate((1, 1, 4, 1)):
                requests = [Request(f"{step}-{at}-{i}", source.choice((50, 900, 30_000))) for i in range(size)]
                placed += run(protocol.dispatch("p", "d", requests, scope=scope)).outcomes
        answers.append(placed)
        looked_up.append(calls(client, "zmscore"))
    assert answers[0] == answers[1]
    assert {placement.rank for placement in answers[0]} == {"b/0", "b/1", "b/2"}
    assert looked_up[0] == looked_up[1] + 19 * 4, "the few by their names, in each dispatch"


def test_why_there_is_no_rank_is_said_of_those_that_were_named(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock
) -> None:
    def reason(**scope: list[str]) -> NoRankReason:
        with pytest.raises(NoRank) as none:
            dispatcher.dispatch("r", 10, **scope)
        return none.value.reason

    join("gone", 1)
    clock.move(5_000)
    join("late", 1), join("full", 1, capacity_tokens=5), join("fine", 1)
    admin.drain("late")
    assert reason(among=["gone/0"]) is NoRankReason.ALL_SILENT
    assert reason(among=["nobody/0"]) is NoRankReason.NOBODY_JOINED
    assert reason(among=["late/0", "gone/0"]) is NoRankReason.ALL_DRAINING
    assert reason(among=["full/0"]) is NoRankReason.ALL_FULL
    assert reason(among=["fine/0"], avoid=["fine/0"]) is NoRankReason.ALL_DRAINING
    assert dispatcher.dispatch("r", 10, among=["fine/0"]).rank == "fine/0"
