"""SGLang's controller with our hooks around it: a controller that keeps SGLang's rules, on a real pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import redis

from balancer import Dispatcher, PoolAdmin, RankCounts, Reporter, Settings, StoreUnavailable
from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.sglang import dispatching, joined, tally, targets
from scheduler_hooks.sglang.dispatching import Dispatching
from tests.clock import Clock
from tests.unit.sglang_cast import hook_all_but_the_first

Join = Callable[..., Reporter]


@dataclass
class TokenizedRequest:
    rid: str
    input_ids: list[int]
    routed_dp_rank: int | None = None


@dataclass
class Controller:
    """SGLang's rules: an unplaced request goes round, a placed one to its rank; an inactive rank ends the server."""

    ranks: int = 4
    method: str = "ROUND_ROBIN"
    status: list[bool] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    node_rank: int = 0

    def __post_init__(self) -> None:
        self.status = self.status or [True] * self.ranks
        self.workers = [object()] * self.ranks
        self._active_workers = [rank for rank in range(self.ranks) if self.status[rank]]
        self.load_balance_method = SimpleNamespace(name=self.method)
        self.server_args = SimpleNamespace(host="127.0.0.1", port=30000, node_rank=self.node_rank)

    def dispatching_with_trace(self, request: TokenizedRequest, refresh_load_budget: bool = True) -> None:
        rank = request.routed_dp_rank
        if rank is None:
            rank = self._active_workers[len(self.sent) % len(self._active_workers)]
        elif rank not in self._active_workers:
            raise ValueError(f"DP rank {rank} is not active.")
        self.sent[request.rid] = rank


class Server:
    """A controller between our hooks, called as SGLang's registry calls them."""

    begun: ClassVar[list[Server]] = []

    def __init__(self, settings: Settings, controller: Controller, **plugin: Any) -> None:
        self.controller = controller
        self.hooks = Dispatching(PluginSettings(settings, engine="e", **plugin))
        self.begun.append(self)

    def dispatch(self, *requests: TokenizedRequest) -> None:
        for request in requests:
            self.hooks.one(Controller.dispatching_with_trace, self.controller, request)

    def dispatch_batch(self, *requests: TokenizedRequest) -> None:
        def original(controller: Controller, batch: tuple[TokenizedRequest, ...]) -> None:
            self.dispatch(*batch)

        self.hooks.batch(original, self.controller, requests)


@pytest.fixture(autouse=True)
def _applied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatching, "not_applied", lambda targets: [])
    monkeypatch.setenv("DP_BALANCER_BUDGET_MS", "2000")
    yield
    while Server.begun:  # a real one's connections end with its process
        if dispatcher := Server.begun.pop().hooks._dispatcher:
            dispatcher.close()


def requests(count: int, tokens: int = 10, prefix: str = "r") -> list[TokenizedRequest]:
    return [TokenizedRequest(f"{prefix}{number}", [1] * tokens) for number in range(count)]


def dispatches(client: redis.Redis) -> int:
    return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def test_each_request_goes_where_the_pool_has_booked_it(settings: Settings, join: Join, dispatcher: Dispatcher) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(8))
    assert sorted(server.controller.sent.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    ranks = dispatcher.snapshot().ranks
    assert [rank.in_flight_tokens for rank in ranks] == [20] * 4


def test_a_batch_costs_one_eval_and_its_requests_are_not_asked_for_again(
    settings: Settings, join: Join, client: redis.Redis
) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(1, prefix="first"))  # connects
    before = dispatches(client)
    server.dispatch_batch(*requests(100))
    assert dispatches(client) == before + 1
    assert len(server.controller.sent) == 101


def test_a_batch_without_a_rank_costs_one_eval_too(
    settings: Settings, join: Join, admin: PoolAdmin, client: redis.Redis
) -> None:
    join("e", 4)
    admin.drain("e")
    server = Server(settings, Controller())
    server.dispatch(*requests(1, prefix="first"))  # connects; no rank may be chosen
    before = dispatches(client)
    server.dispatch_batch(*requests(100))
    assert dispatches(client) == before + 1
    server.dispatch(*requests(1, prefix="last"))
    assert dispatches(client) == before + 2
    assert len(server.controller.sent) == 102


def test_a_dispatcher_that_cannot_be_built_is_tried_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def broken(settings: Settings) -> None:
        tries.append(settings)
        raise OSError("no such certificate")

    monkeypatch.setattr(dispatching, "Dispatcher", broken)
    server = Server(settings, Controller())
    server.hooks.ready(None, server.controller)
    server.dispatch(*requests(8))
    assert len(tries) == 1
    assert len(server.controller.sent) == 8
    assert "no such certificate" in caplog.text


def test_a_rank_that_sglang_holds_inactive_is_never_chosen(settings: Settings, join: Join) -> None:
    join("e", 4)
    server = Server(settings, Controller(status=[True, False, True, False]))
    server.dispatch(*requests(20))
    assert set(server.controller.sent.values()) == {0, 2}


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "PATIENCE_S", 0.0)
    monkeypatch.setattr(joined, "LOOK_S", 0.0)


@pytest.mark.usefixtures("_impatient")
def test_while_a_rank_has_never_joined_sglang_places_and_its_name_is_said_once(
    settings: Settings, join: Join, dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the second node's image lacks the plugin: a pool of half the ranks would leave the others idle."""
    for index in (0, 1):
        join("e", 1, index=index)
    server = Server(settings, Controller())
    with caplog.at_level(logging.INFO):
        server.dispatch(*requests(8))
        assert sorted(server.controller.sent.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert dispatcher.snapshot().bookings == 0
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "until e/2, e/3 reports to the pool" in said
        for index in (2, 3):
            join("e", 1, index=index)
        server.dispatch(*requests(8, prefix="s"))
    assert dispatcher.snapshot().bookings == 8
    assert "all ranks of e are in the pool now" in caplog.text


@pytest.mark.usefixtures("_impatient")
def test_until_a_look_is_answered_no_rank_counts_as_joined(
    settings: Settings,
    join: Join,
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a large pool a snapshot misses so small a budget now and then, while a dispatch is answered."""
    for index in (0, 1):
        join("e", 1, index=index)
    server = Server(settings, Controller())
    server.hooks.ready(None, server.controller)
    assert server.hooks._dispatcher
    with monkeypatch.context() as slow:

        def late() -> None:
            raise StoreUnavailable("no answer within 5 ms")

        slow.setattr(server.hooks._dispatcher, "snapshot", late)
        server.dispatch(*requests(8))
    assert sorted(server.controller.sent.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dispatcher.snapshot().bookings == 0
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == "SGLang's own method places until the pool says which ranks it has: no answer within 5 ms"
    for index in (2, 3):
        join("e", 1, index=index)
    server.dispatch(*requests(8, prefix="s"))
    assert dispatcher.snapshot().bookings == 8


@pytest.mark.usefixtures("_impatient")
def test_a_rank_that_becomes_active_during_an_outage_does_not_end_the_looking(
    settings: Settings, join: Join, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is missing nothing is dispatched, so nothing else would notice that Redis is back."""
    for index in range(3):
        join("e", 1, index=index)
    server = Server(replace(settings, probe_ms=1), Controller(status=[True, True, True, False]))
    server.dispatch(*requests(1, prefix="first"))
    assert server.hooks._dispatcher
    with monkeypatch.context() as outage:

        def away(operation: Any) -> Any:
            raise StoreUnavailable("connection refused")

        outage.setattr(server.hooks._dispatcher._store, "run", away)
        server.dispatch(*requests(10))
    join("e", 1, index=3)
    server.controller.status[3] = True
    server.controller._active_workers.append(3)
    server.dispatch(*requests(4, prefix="s"))
    assert dispatcher.snapshot().bookings == 5


@pytest.mark.usefixtures("_impatient")
def test_a_rank_that_has_joined_and_gone_silent_stays_avoided(
    settings: Settings, join: Join, dispatcher: Dispatcher, clock: Clock
) -> None:
    reporters = [join("e", 1, index=index) for index in range(4)]
    server = Server(settings, Controller())
    server.dispatch(*requests(4))
    clock.move(10_000)
    for reporter in reporters[:3]:
        reporter.report(1, [RankCounts(0, 0)])
    server.controller.sent.clear()
    server.dispatch(*requests(12, prefix="s"))
    assert set(server.controller.sent.values()) == {0, 1, 2}


def test_ranks_of_a_former_life_have_not_joined_this_one(
    settings: Settings, join: Join, dispatcher: Dispatcher, clock: Clock
) -> None:
    join("e", 4)
    clock.move(20_000)
    server = Server(settings, Controller())
    server.dispatch(*requests(4))
    assert sorted(server.controller.sent.values()) == [0, 1, 2, 3]
    assert dispatcher.snapshot().bookings == 0


def test_once_all_have_joined_nobody_is_looked_for(settings: Settings, join: Join, client: redis.Redis) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(2))
    before = dispatches(client)
    server.dispatch(*requests(20, prefix="s"))
    assert dispatches(client) == before + 20


def test_one_dispatch_that_misses_its_budget_leaves_the_next_ones_to_the_pool(
    settings: Settings, join: Join, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(1, prefix="first"))
    assert server.hooks._dispatcher
    store, slow = server.hooks._dispatcher._store, [True, True]

    def run(operation: Any, answer: Any = store.run) -> Any:
        if slow:
            slow.pop()
            raise StoreUnavailable("no answer within 5 ms")
        return answer(operation)

    monkeypatch.setattr(store, "run", run)
    server.dispatch(*requests(10))
    counters = server.hooks._dispatcher.counters
    assert (counters.placed, counters.fallback, counters.outages) == (9, 2, 0)


def test_what_sglang_placed_during_an_outage_is_told_when_it_ends(
    settings: Settings, join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    join("e", 4)
    server = Server(replace(settings, probe_ms=1), Controller())
    server.dispatch(*requests(1, prefix="first"))
    assert server.hooks._dispatcher
    store = server.hooks._dispatcher._store
    with monkeypatch.context() as outage, caplog.at_level(logging.INFO):

        def away(operation: Any) -> Any:
            raise StoreUnavailable("connection refused")

        outage.setattr(store, "run", away)
        server.dispatch(*requests(10))
        assert "own method placed" not in caplog.text
    with caplog.at_level(logging.INFO):
        time.sleep(0.005)  # a probe is due
        server.dispatch(*requests(1, prefix="last"))
    (said,) = [message for message in caplog.messages if "own method placed" in message]
    assert "of the last 12 requests SGLang's own method placed 10: 10 without an answer from Redis in time" in said


def test_why_there_is_no_rank_is_said_again_where_it_is_another_reason(
    settings: Settings,
    join: Join,
    admin: PoolAdmin,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tally, "TELL_S", 0.0)
    join("e", 4)
    admin.drain("e")
    server = Server(settings, Controller())
    with caplog.at_level(logging.INFO):
        server.dispatch(*requests(4))
        clock.move(10_000)
        server.dispatch(*requests(4, prefix="s"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [said.partition("(")[2].partition(")")[0] for said in warnings] == ["all_draining", "all_silent"]
    assert "own method placed 1: 1 without a rank (all_silent)" in caplog.text


def test_a_controller_that_sglang_has_not_hooked_is_named_and_left_alone(
    settings: Settings, join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang only logs a hook that it could not apply; here the real question is asked of a registry."""
    hook_all_but_the_first(monkeypatch, targets.CONTROLLER_TARGETS)
    monkeypatch.setattr(dispatching, "not_applied", targets.not_applied)
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(4))
    assert sorted(server.controller.sent.values()) == [0, 1, 2, 3]
    (said,) = caplog.messages
    assert f"SGLang has not hooked {targets.DISPATCH_ONE.path}" in said


def test_probes_and_requests_that_have_a_rank_are_left_alone(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    routed = TokenizedRequest("theirs", [1], routed_dp_rank=3)
    server.dispatch(TokenizedRequest("HEALTH_CHECK_1", [1]), routed)
    assert server.controller.sent["theirs"] == 3
    assert dispatcher.snapshot().bookings == 0


def test_only_ranks_of_its_own_engine_are_chosen_in_a_pool_of_two(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("other", 4)
    mine = join("e", 4)
    mine.report(1, [RankCounts(50_000, 1)] * 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(8))
    loads = {rank.rank: rank.in_flight_tokens for rank in dispatcher.snapshot().ranks}
    assert all(loads[f"other/{index}"] == 0 for index in range(4))
    assert sum(loads.values()) == 80


def test_an_outside_dispatchers_booking_is_kept_where_it_forgot_to_name_the_rank(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 4)
    booked = dispatcher.dispatch("r0", 10)
    server = Server(settings, Controller())
    server.dispatch(*requests(1))
    assert server.controller.sent["r0"] == booked.index
    assert dispatcher.snapshot().bookings == 1


def test_a_request_booked_on_another_engine_is_placed_by_sglang(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("other", 1)
    dispatcher.dispatch("r0", 10)
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch(*requests(1))
    assert server.controller.sent == {"r0": 0}


def test_without_an_answer_sglangs_own_method_decides(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    away = Settings(url="redis://127.0.0.1:1/0", pool="p", budget_ms=50)
    server = Server(away, Controller())
    server.dispatch(*requests(8))
    server.dispatch_batch(*requests(8, prefix="b"))
    assert sorted(server.controller.sent.values()) == sorted([0, 1, 2, 3] * 4)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 2


def test_a_pool_that_nobody_has_joined_leaves_it_to_sglang(settings: Settings, client: redis.Redis) -> None:
    server = Server(settings, Controller())
    server.dispatch(*requests(4))
    assert sorted(server.controller.sent.values()) == [0, 1, 2, 3]


def test_an_id_that_cannot_be_booked_costs_the_others_nothing(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 4)
    server = Server(settings, Controller())
    server.dispatch_batch(TokenizedRequest("x" * 600, [1]), *requests(4))
    assert len(server.controller.sent) == 5
    assert dispatcher.snapshot().bookings == 4


def test_an_embedded_prompt_without_token_ids_is_counted_by_its_embeddings(
    settings: Settings, join: Join, dispatcher: Dispatcher
) -> None:
    join("e", 1)
    embedded = SimpleNamespace(rid="r", input_ids=None, input_embeds=[[0.0]] * 7, routed_dp_rank=None)
    Server(settings, Controller(ranks=1)).dispatch(embedded)  # type: ignore[arg-type]
    assert dispatcher.snapshot().ranks[0].in_flight_tokens == 7


def test_follow_bootstrap_room_is_refused_with_the_flag_to_set(
    settings: Settings, join: Join, dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    join("e", 4)
    server = Server(settings, Controller(method="FOLLOW_BOOTSTRAP_ROOM"))
    with caplog.at_level(logging.ERROR):
        server.dispatch(*requests(4))
    assert len(server.controller.sent) == 4
    assert dispatcher.snapshot().bookings == 0
    (said,) = caplog.messages
    assert "--load-balance-method total_tokens" in said
    assert "on prefill and on every decode server" in said


@pytest.mark.parametrize("value", ["1", "True", "yes", "y"])
def test_follow_bootstrap_room_is_placed_where_sglang_is_told_to_ask_for_the_rank(
    settings: Settings, join: Join, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    join("e", 4)
    monkeypatch.setenv("SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK", value)
    Server(settings, Controller(method="FOLLOW_BOOTSTRAP_ROOM")).dispatch(*requests(4))
    assert dispatcher.snapshot().bookings == 4


def test_a_controller_of_a_later_node_does_not_dispatch(settings: Settings, join: Join) -> None:
    join("e", 4)
    server = Server(settings, Controller(node_rank=1))
    server.hooks.ready(None, server.controller)
    assert server.hooks._dispatcher is None


def test_what_sglang_itself_raises_goes_on_to_sglang(settings: Settings, join: Join) -> None:
    join("e", 4)
    server = Server(settings, Controller(status=[True, False, True, True]))
    with pytest.raises(ValueError, match="DP rank 1 is not active"):
        server.dispatch(TokenizedRequest("theirs", [1], routed_dp_rank=1))
