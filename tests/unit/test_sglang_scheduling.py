"""SGLang's scheduler with our hooks: what it has received and holds, step by step, as the pool sees it.

The scheduler here counts as SGLang does: queued prompts whole, a prompt in chunks only by the chunks that are done.
The defects of the seed (`minimum_tokens` in SGLang 0.4.10 to 0.5.2) each have a test here, in `test_sglang_dispatching`
or in `tests/e2e/test_sglang_gather`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from balancer import Dispatcher, Request, Settings, in_flight_id
from balancer.marker import marked
from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.sglang import agreement, scheduling, targets
from scheduler_hooks.sglang.agreement import Agreement
from scheduler_hooks.sglang.counting import Counting
from scheduler_hooks.sglang.scheduling import Scheduling
from tests.unit.sglang_cast import hook_all_but_the_first

Eventually = Callable[..., None]


KV_TOKENS = 10_000


class Scheduler:
    """SGLang's objects as far as they are read, and a step that does what a test says."""

    def __init__(self, rank: int | None = 0) -> None:
        self.load_snapshot_writer = None if rank is None else SimpleNamespace(dp_rank=rank)
        self.ipc_channels = SimpleNamespace(recv_from_tokenizer=None)
        self.server_args = SimpleNamespace(host="127.0.0.1", port=30000, nnodes=1, sleep_on_idle=False)
        self.req_to_token_pool = SimpleNamespace(available_size=lambda: 64 - len(self.running))
        self.load_inquirer = SimpleNamespace(get_loads=self._loads)
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.disagg_decode_prealloc_queue = SimpleNamespace(queue=[], retracted_queue=[])
        self.chunked_req: Any = None
        self.tp_cpu_group: Any = None
        self.waiting: list[Any] = []
        self.running: dict[str, int] = {}  # by rid: tokens in the KV pool

    def _loads(self) -> Any:
        used = sum(self.running.values())
        return SimpleNamespace(
            num_total_tokens=used + sum(len(request.input_ids) for request in self.waiting),
            num_used_tokens=used,
            max_total_num_tokens=KV_TOKENS,
            num_running_reqs=0,
            num_waiting_reqs=len(self.waiting),
        )

    def prefill(self, chunk: int = 10**9) -> None:
        for request in self.waiting:
            done = min(chunk, len(request.input_ids))
            self.running[request.rid] = done
            if done < len(request.input_ids):
                self.chunked_req = SimpleNamespace(seqlen=len(request.input_ids), kv_allocated_len=done)
        self.waiting = []


def request(rid: str, tokens: int) -> Any:
    return SimpleNamespace(rid=rid, input_ids=[1] * tokens)


class Rank:
    """A scheduler and its hooks, called in the order of SGLang's loop."""

    def __init__(self, settings: Settings, scheduler: Scheduler | None = None, **plugin: Any) -> None:
        self.scheduler = scheduler or Scheduler()
        self.hooks = Scheduling(PluginSettings(settings, engine="e", **{"form": "leader", **plugin}))
        self.loop()

    def loop(self, *messages: Any, queue: bool = True) -> None:
        """One round without a batch."""
        self.receive(*messages, queue=queue)
        self.hooks.idle(self.scheduler)

    def receive(self, *messages: Any, queue: bool = True) -> None:
        for message in messages if queue else ():
            queued = getattr(message, "batch", [message])
            self.scheduler.waiting.extend(one for one in queued if hasattr(one, "input_ids"))
        self.hooks.received(None, self.scheduler, list(messages))

    def step(self, *messages: Any, chunk: int = 10**9) -> None:
        self.receive(*messages)
        self.scheduler.prefill(chunk)
        self.hooks.stepped(None, self.scheduler, object(), object())

    def close(self) -> None:
        if self.hooks._hook:
            self.hooks._hook.close()


@pytest.fixture
def rank(settings: Settings, dispatcher: Dispatcher, eventually: Eventually) -> Iterator[Rank]:
    rank = Rank(settings)
    eventually(lambda: _ranks(dispatcher), "the rank has joined")
    yield rank
    rank.close()


@pytest.fixture(autouse=True)
def _applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "not_applied", lambda targets: [])
    monkeypatch.setattr(scheduling, "IDLE_REPORT_S", 0.0)


def _ranks(dispatcher: Dispatcher) -> tuple[Any, ...]:
    try:
        return dispatcher.snapshot().ranks
    except Exception:
        return ()


def shows(dispatcher: Dispatcher, *, holding: int, in_flight: int, requests: int | None = None) -> bool:
    (seen,) = dispatcher.snapshot().ranks
    right = (seen.holding_tokens, seen.in_flight_tokens) == (holding, in_flight)
    return right and requests in (None, seen.requests)


def test_an_id_ends_in_the_report_that_counts_its_tokens(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    loads = []
    for number in range(5):
        dispatcher.dispatch(f"r{number}", 100)
        loads.append(dispatcher.snapshot().ranks[0].load_tokens)
        rank.step(request(f"r{number}", 100))
        count = number + 1
        eventually(lambda n=count: shows(dispatcher, holding=100 * n, in_flight=0, requests=n), "it is counted")
    assert loads == [100, 200, 300, 400, 500]  # never more, never less, whoever counts it


def test_a_prompt_in_chunked_prefill_counts_whole_from_the_first_chunk(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    dispatcher.dispatch("long", 1_500)
    rank.step(request("long", 1_500), chunk=256)
    assert rank.scheduler.load_inquirer.get_loads().num_total_tokens == 256  # what SGLang itself balances by
    eventually(lambda: shows(dispatcher, holding=1_500, in_flight=0, requests=1), "it counts whole")
    rank.scheduler.running["long"] = rank.scheduler.chunked_req.kv_allocated_len = 512
    rank.step()
    eventually(lambda: shows(dispatcher, holding=1_500, in_flight=0), "and stays whole")


def test_what_has_no_kv_yet_and_how_full_the_cache_is_are_told_too(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    def told() -> tuple[int | None, int | None]:
        (seen,) = dispatcher.snapshot().ranks
        return seen.pending_tokens, seen.kv_permille

    rank.step(request("long", 1_500), chunk=256)
    rank.loop(request("short", 100))
    eventually(lambda: told() == (1_500 - 256 + 100, 25), "the rest of a chunked prompt waits, and what is queued")
    rank.scheduler.running["long"], rank.scheduler.chunked_req = 1_500, None
    rank.step()
    eventually(lambda: told() == (0, 160), "everything has its KV")


def test_a_ranks_kv_cache_is_its_capacity_where_that_is_asked_for(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    rank = Rank(settings, capacity=True)
    eventually(lambda: bool(_ranks(dispatcher)), "it has joined")
    assert _ranks(dispatcher)[0].capacity_tokens == KV_TOKENS
    rank.close()


def test_a_request_whose_grammar_is_compiled_stays_in_flight_until_it_counts(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    dispatcher.dispatch("json", 70)
    compiling = request("json", 70)
    rank.scheduler.grammar_manager.grammar_queue.append(compiling)
    rank.loop(compiling, queue=False)
    rank.step(request("plain", 5))
    eventually(lambda: shows(dispatcher, holding=5, in_flight=70), "still in flight")
    rank.scheduler.grammar_manager.grammar_queue.clear()
    rank.scheduler.waiting.append(compiling)
    rank.step()
    eventually(lambda: shows(dispatcher, holding=75, in_flight=0), "counted, and no more in flight")


def test_a_request_that_is_rejected_at_once_ends_without_a_step(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    dispatcher.dispatch("too-long", 900)
    rank.loop(request("too-long", 900), queue=False)
    eventually(lambda: shows(dispatcher, holding=0, in_flight=0), "its booking has ended")


def test_an_abort_of_a_queued_request_is_seen_without_a_step(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    rank.loop(request("r", 40))
    eventually(lambda: shows(dispatcher, holding=40, in_flight=0), "it is queued")
    rank.scheduler.waiting.clear()
    rank.loop()
    eventually(lambda: shows(dispatcher, holding=0, in_flight=0, requests=0), "it is gone")


def test_two_thousand_ids_in_one_step_all_end(rank: Rank, dispatcher: Dispatcher, eventually: Eventually) -> None:
    batch = [request(f"r{number}", 3) for number in range(2_000)]
    dispatcher.dispatch_many([Request(one.rid, 3) for one in batch])
    rank.step(SimpleNamespace(batch=batch))
    eventually(lambda: shows(dispatcher, holding=6_000, in_flight=0, requests=2_000), "every one of them")


def test_a_request_that_nobody_booked_is_counted_and_harms_nothing(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    rank.step(request("routed-by-somebody-else", 30), SimpleNamespace(what="a control message"))
    rank.step(request("routed-by-somebody-else", 30))
    eventually(lambda: shows(dispatcher, holding=30, in_flight=0), "it is counted")
    assert not rank.hooks._trouble.counts


def test_an_id_that_carries_a_mark_is_known_by_it(rank: Rank, dispatcher: Dispatcher, eventually: Eventually) -> None:
    dispatcher.dispatch("mine", 20)
    rank.step(request(f"cmpl-{marked('mine')}-0", 20))
    eventually(lambda: shows(dispatcher, holding=20, in_flight=0), "its booking has ended")


def test_a_marked_id_ends_both_its_bookings_and_its_tokens_are_told_once(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines_id = f"cmpl-{marked('mine')}-0"
    dispatcher.dispatch("mine", 20)  # by a dispatcher outside
    dispatcher.dispatch(engines_id, 20)  # by SGLang's controller
    assert rank.hooks._hook
    told, after_step = [], rank.hooks._hook.after_step
    monkeypatch.setattr(rank.hooks._hook, "after_step", lambda *step: (told.append(step), after_step(*step)))
    rank.step(request(engines_id, 20))
    assert [step[:3] for step in told] == [(20, 1, {in_flight_id("mine"): 20, in_flight_id(engines_id): 0})]
    eventually(lambda: shows(dispatcher, holding=20, in_flight=0), "both bookings have ended")


def test_what_a_paused_engine_receives_is_told(rank: Rank, dispatcher: Dispatcher, eventually: Eventually) -> None:
    rank.scheduler._engine_paused = True  # its loop only receives
    dispatcher.dispatch("r", 40)
    rank.receive(request("r", 40))
    eventually(lambda: shows(dispatcher, holding=40, in_flight=0), "it is queued")
    rank.scheduler.waiting.clear()
    rank.receive()
    eventually(lambda: shows(dispatcher, holding=0, in_flight=0, requests=0), "it is aborted")


def test_an_idle_rank_that_compiles_a_grammar_is_not_looked_at_all_the_time(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "IDLE_REPORT_S", 60.0)
    looks, loads = [], rank.scheduler.load_inquirer.get_loads
    rank.scheduler.load_inquirer.get_loads = lambda: (looks.append(1), loads())[1]
    compiling = request("json", 70)
    rank.scheduler.grammar_manager.grammar_queue.append(compiling)
    rank.loop(compiling, queue=False)
    for _ in range(100):
        rank.loop()
    assert len(looks) == 1


def test_an_embedding_request_is_acknowledged_like_any_other(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    dispatcher.dispatch("embed", 20)
    embedding = SimpleNamespace(rid="embed", input_ids=[1] * 20, image_inputs=None)
    rank.step(SimpleNamespace(batch=[embedding]))
    eventually(lambda: shows(dispatcher, holding=20, in_flight=0), "its booking has ended")


def test_a_process_that_leads_no_rank_reports_nothing(settings: Settings, dispatcher: Dispatcher) -> None:
    follower = Rank(settings, Scheduler(rank=None))
    follower.step(request("r", 10))
    assert follower.hooks._hook is None
    assert not _ranks(dispatcher)


def test_a_scheduler_that_cannot_be_read_goes_on_and_it_is_said_once(
    rank: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    rank.scheduler.load_inquirer = None
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            rank.step(request("r", 10))
    assert len(caplog.messages) == 1
    assert "the engine goes on without" in caplog.messages[0]


def test_a_rank_that_cannot_be_read_for_long_is_reported_no_more(
    rank: Rank, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "UNREADABLE_S", 0.0)
    assert rank.hooks._hook
    publisher: Any = rank.hooks._hook.publisher
    rank.scheduler.load_inquirer = None
    for number in range(10):
        rank.step(request(f"r{number}", 10))
    assert publisher._is_silent
    assert not rank.hooks._received
    assert "reports e/0 no more" in caplog.text
    publisher.close()


@pytest.mark.parametrize("broken", ["Counting", "StepHook"])
def test_a_rank_that_cannot_be_attached_is_not_reported_empty_and_keeps_no_ids(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduling, broken, None)
    rank = Rank(settings)
    for number in range(10):
        rank.step(request(f"r{number}", 10))
        rank.loop()
    assert rank.hooks._hook is None
    assert not rank.hooks._received
    assert len(caplog.messages) == 1


def test_ids_that_no_report_takes_are_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "MAX_WAITING_IDS", 10)
    hooks = Scheduling(PluginSettings(settings, engine="e", form="gather"))
    scheduler = Scheduler()
    for number in range(25):
        hooks.received(None, scheduler, [request(f"r{number}", 1)])
    assert list(hooks._received) == [f"r{number}" for number in range(15, 25)]


def test_of_each_third_step_the_others_are_not_even_counted(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    rank = Rank(settings, every=3)
    eventually(lambda: _ranks(dispatcher), "the rank has joined")
    looks, loads = [], rank.scheduler.load_inquirer.get_loads
    rank.scheduler.load_inquirer.get_loads = lambda: (looks.append(1), loads())[1]
    dispatcher.dispatch_many([Request(f"r{number}", 10) for number in range(9)])
    for number in range(9):
        rank.step(request(f"r{number}", 10))
    assert len(looks) == 3
    rank.loop()
    eventually(lambda: shows(dispatcher, holding=90, in_flight=0, requests=9), "none of their ids is lost")
    rank.close()


def test_a_queue_that_takes_long_to_count_is_not_counted_at_each_step(
    rank: Rank, dispatcher: Dispatcher, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "CHEAP_S", 0.0)
    monkeypatch.setattr(scheduling, "COUNTING_SHARE", 1e-9)
    dispatcher.dispatch_many([Request(f"r{number}", 10) for number in range(5)])
    looks, loads = [], rank.scheduler.load_inquirer.get_loads
    rank.scheduler.load_inquirer.get_loads = lambda: (looks.append(1), loads())[1]
    for number in range(5):
        rank.step(request(f"r{number}", 10))
    assert len(looks) == 1
    eventually(lambda: shows(dispatcher, holding=10, in_flight=40), "what is not counted is in flight")
    rank.hooks._next_count_s = 0.0  # time has passed
    rank.loop()
    eventually(lambda: shows(dispatcher, holding=50, in_flight=0), "counted, and its ids with it")


def test_a_prefill_server_counts_what_it_computes_and_what_it_transfers(settings: Settings) -> None:
    """SGLang's own numbers know neither: its prefill loop has no running batch, and what is transferred is in no queue.

    A rank that transfers much would look as if it had few requests, and draw more.
    """
    scheduler = Scheduler()
    scheduler.disaggregation_mode = SimpleNamespace(name="PREFILL")  # type: ignore[attr-defined]
    counting = Counting(scheduler)
    scheduler.running = {"computed": 10, "transferred": 20}  # each has a slot
    scheduler.waiting = [request("waits", 5)]
    assert counting.held().requests == 3


def test_a_decode_server_counts_each_request_once(settings: Settings) -> None:
    """There a request has its row already while its KV is on its way, and SGLang counts it as waiting.

    With pipeline parallelism SGLang's count of the running is that of one micro-batch: here none.
    """
    scheduler = Scheduler()
    scheduler.disaggregation_mode = SimpleNamespace(name="DECODE")  # type: ignore[attr-defined]
    counting = Counting(scheduler)
    scheduler.running = {"on its way": 20, "computed": 10, "computed in another micro-batch": 10}
    scheduler.waiting = [request("on its way", 20), request("without a row", 5), request("retracted", 5)]
    scheduler.disagg_decode_prealloc_queue.queue = [scheduler.waiting[1]]
    scheduler.disagg_decode_prealloc_queue.retracted_queue = [scheduler.waiting[2]]
    assert counting.held().requests == 5


def test_a_server_that_switches_its_role_counts_by_the_role_that_it_has(settings: Settings) -> None:
    scheduler = Scheduler()
    scheduler.disaggregation_mode = SimpleNamespace(name="PREFILL")  # type: ignore[attr-defined]
    counting = Counting(scheduler)
    scheduler.running = {"has a row": 20}
    scheduler.waiting = [request("has a row", 20)]
    assert counting.held().requests == 2, "one is transferred, one waits"
    scheduler.disaggregation_mode = SimpleNamespace(name="DECODE")  # type: ignore[attr-defined]
    assert counting.held().requests == 1, "its KV is on its way"


@pytest.mark.parametrize("has_row_from_start", [True, False], ids=["0.5.22 and later", "before"])
def test_a_streaming_session_counts_while_it_has_a_turn_only(settings: Settings, has_row_from_start: bool) -> None:
    """Between two turns it keeps its row, and SGLang's own check of an idle scheduler takes such rows for free ones."""
    scheduler = Scheduler()
    counting = Counting(scheduler)
    sessions = {id_: SimpleNamespace(session_id=id_, _inflight=False, req_nodes={"turn": 1}) for id_ in "abc"}
    scheduler.server_args.enable_streaming_session = True
    kept = list("abc")
    more: dict[str, Any] = {
        "session_controller": SimpleNamespace(sessions=sessions),
        "pool_stats_observer": SimpleNamespace(session_held_req_count=lambda: len(kept)),
        "tree_cache": SimpleNamespace(**({"session_records": dict} if has_row_from_start else {})),
        "waiting_queue": scheduler.waiting,
    }
    vars(scheduler).update(more)
    scheduler.running = dict.fromkeys(kept, 10)
    assert counting.held().requests == 0, "none of them has a turn"
    sessions["a"]._inflight = True
    assert counting.held().requests == 1, "a turn is computed, on the session's row"
    sessions["b"]._inflight = True
    turn = request("turn", 5)
    turn.session = sessions["b"]
    scheduler.waiting.append(turn)
    assert counting.held().requests == 2, "another one waits"
    scheduler.running["d"] = 10
    sessions["d"] = SimpleNamespace(session_id="d", _inflight=True, req_nodes={})
    if has_row_from_start:
        kept.append("d")
    assert counting.held().requests == 3, "a session's first turn is computed"


@pytest.mark.parametrize(("release", "reports"), [("0.5.13.post1", False), ("0.5.14", True)])
def test_a_release_that_counts_a_decode_servers_requests_twice_is_not_reported(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    release: str,
    reports: bool,
) -> None:
    monkeypatch.setattr(scheduling, "version", lambda: release)
    scheduler = Scheduler()
    scheduler.disaggregation_mode = SimpleNamespace(name="DECODE")  # type: ignore[attr-defined]
    rank = Rank(settings, scheduler)
    rank.step(request("r", 10))
    assert bool(rank.hooks._hook) is reports
    assert ("0.5.13.post1 counts requests of a decode server twice" in caplog.text) is not reports
    rank.close()


def test_a_scheduler_that_sglang_has_not_hooked_is_named_and_not_reported(
    settings: Settings, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hook_all_but_the_first(monkeypatch, targets.SCHEDULER_TARGETS)
    monkeypatch.setattr(scheduling, "not_applied", targets.not_applied)
    rank = Rank(settings)
    rank.step(request("r", 10))
    assert rank.hooks._hook is None
    assert not _ranks(dispatcher)
    (said,) = caplog.messages
    assert f"SGLang has not hooked {targets.RECEIVED.path}" in said


def test_an_idle_rank_reports_nothing_new(rank: Rank, dispatcher: Dispatcher, eventually: Eventually) -> None:
    rank.step(request("r", 10))
    eventually(lambda: shows(dispatcher, holding=10, in_flight=0), "it is counted")
    assert rank.hooks._hook
    before = rank.hooks._hook._step
    for _ in range(1_000):
        rank.loop()
    assert rank.hooks._hook._step == before


def test_what_happened_between_two_reports_of_every_third_step_is_told_when_idle(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually
) -> None:
    rank = Rank(settings, every=3)
    eventually(lambda: _ranks(dispatcher), "the rank has joined")
    dispatcher.dispatch("r", 10)
    rank.step(request("r", 10))
    for _ in range(10):
        rank.loop()
    eventually(lambda: shows(dispatcher, holding=10, in_flight=0), "it is counted")
    rank.close()


def test_where_ranks_exchange_nothing_the_gather_is_off_and_it_is_said(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain = Rank(settings, form="gather")
    eventually(lambda: len(_ranks(dispatcher)) == 1, "it reports alone")
    assert "does not gather" in caplog.text
    plain.close()


def test_with_pipeline_parallelism_the_gather_is_off_and_it_is_said(
    settings: Settings,
    dispatcher: Dispatcher,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gather = pytest.importorskip("scheduler_hooks.gather")
    monkeypatch.setattr(gather, "sizes", lambda group: (2, 4))
    scheduler = Scheduler()
    hooks = Scheduling(PluginSettings(settings, engine="e", form="gather"))
    hooks.received(None, scheduler, [])
    info = SimpleNamespace(global_num_tokens=[0, 0], num_dp_ranks=2)
    with caplog.at_level(logging.WARNING):
        hooks.synced(None, info, device="cpu", group=None)
    assert "exchange over another group" in caplog.text
    eventually(lambda: len(_ranks(dispatcher)) == 1, "it reports alone")
    assert hooks._hook
    hooks._hook.close()


def test_with_elastic_ep_the_gather_is_off_and_it_is_said(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Its first exchange is like any other: only after a scale-up it is another group's."""
    pytest.importorskip("scheduler_hooks.gather")
    scheduler = Scheduler()
    scheduler.server_args.elastic_ep_backend = "mooncake"
    hooks = Scheduling(PluginSettings(settings, engine="e", form="gather"))
    hooks.received(None, scheduler, [])
    hooks.synced(None, SimpleNamespace(global_num_tokens=[0, 0], num_dp_ranks=2), device="cpu", group=None)
    assert "with elastic EP" in caplog.text
    assert hooks._hook
    hooks._hook.close()


def test_a_node_that_joins_by_elastic_ep_does_not_take_a_live_ranks_name(
    rank: Rank, settings: Settings, dispatcher: Dispatcher, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang numbers a joiner's schedulers from 0 again, and the name of the engine is alike on all nodes."""
    scheduler = Scheduler()
    scheduler.server_args.ep_join_rank_offset = 8
    joiner = Rank(settings, scheduler)
    joiner.step(request("theirs", 10))
    rank.step(request("r", 70))
    eventually(lambda: shows(dispatcher, holding=70, in_flight=0), "the live rank goes on reporting")
    assert joiner.hooks._hook is None
    (said,) = caplog.messages
    assert "joins by elastic EP" in said


class Store:
    """The group's key-value store; `broken` makes the next read fail."""

    def __init__(self) -> None:
        self.spoken: dict[str, int] = {}
        self.broken = False

    def add(self, key: str, count: int) -> int:
        if self.broken:
            self.broken = False
            raise RuntimeError("the store does not answer")
        self.spoken[key] = self.spoken.get(key, 0) + count
        return self.spoken[key]


@pytest.mark.parametrize("broken_in", [0, 1, 2])
def test_a_process_that_cannot_read_the_agreement_never_parts_from_the_others(broken_in: int) -> None:
    store = Store()
    processes = [Agreement("key", 2, store) for _ in range(2)]
    ended: list[list[bool]] = []
    going = [True, True]
    for number in range(agreement.ROUNDS):
        for process, goes in zip(processes, going, strict=True):
            if goes:
                process.speak()
        for at, process in enumerate(processes):
            store.broken = at == 1 and number == broken_in
            try:
                going[at] = going[at] and process.is_reached()
            except RuntimeError:
                going[at] = False
        ended.append(list(going))
    assert ended[-1] in ([True, True], [False, False])
    assert ended[-1] == [broken_in > 0] * 2


def test_processes_of_other_versions_agree_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    mine = Agreement("key", 2, store)
    monkeypatch.setattr(agreement, "PROTOCOL", agreement.PROTOCOL + 1)
    theirs = Agreement("key", 2, store)
    mine.speak()
    theirs.speak()
    assert not mine.is_reached()
    assert not theirs.is_reached()


def test_a_rank_that_cannot_count_agrees_to_no_gather(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = pytest.importorskip("scheduler_hooks.gather")
    spoken = {"dp_balancer": 0}

    def add(key: str, count: int) -> int:
        spoken["dp_balancer"] += count
        return spoken["dp_balancer"]

    monkeypatch.setattr(gather, "sizes", lambda group: (2, 2))
    monkeypatch.setattr(gather, "everybodys_store", lambda: SimpleNamespace(add=add))
    info = SimpleNamespace(global_num_tokens=[0, 0], num_dp_ranks=2)
    monkeypatch.setattr(scheduling, "Counting", None)
    hooks = Scheduling(PluginSettings(settings, engine="e", form="gather"))
    hooks.received(None, Scheduler(), [])
    for _ in range(2):
        hooks.synced(None, info, device="cpu", group=None)
    assert spoken == {"dp_balancer": 0}
    assert hooks._is_settled
    assert hooks._hook is None


def test_a_scheduler_whose_loop_hangs_leaves_the_pool_until_it_goes_on(
    rank: Rank, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """As when a peer of a collective is gone: the process lives, and SGLang waits minutes before it ends it."""
    monkeypatch.setattr(scheduling, "STUCK_S", 0.1)
    rank.loop()
    (engine,) = dispatcher.snapshot().engines
    eventually(lambda: dispatcher.snapshot().engines[0].age_ms > 2_000, "no heartbeat comes")
    monkeypatch.setattr(scheduling, "STUCK_S", 60.0)
    rank.loop()
    eventually(lambda: dispatcher.snapshot().engines[0].age_ms < 1_000, "it reports again")
    assert dispatcher.snapshot().engines[0].epoch == engine.epoch
