"""The plugin for vLLM without vLLM: names, switches, counts, the dispatcher inside, and a polite refusal."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balancer import InvalidInput, RankCounts, Reporter, Settings, in_flight_id
from balancer.marker import marked
from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.vllm.counts import Counts
from scheduler_hooks.vllm.dispatching import InsideDispatcher, dispatching
from scheduler_hooks.vllm.environment import agree_on_engine, default_engine, log_as_vllm
from scheduler_hooks.vllm.registering import registering
from scheduler_hooks.vllm.scheduler import Reporting, reporting


@pytest.mark.parametrize(
    ("arguments", "ends_with"),
    [
        (["vllm", "serve", "m"], "-8000"),
        (["vllm", "serve", "m", "--port", "8123"], "-8123"),
        (["vllm", "serve", "m", "--port=8124", "-dp", "4"], "-8124"),
    ],
)
def test_an_engine_is_named_by_its_host_and_port(arguments: list[str], ends_with: str) -> None:
    assert default_engine(arguments).endswith(ends_with)


@pytest.mark.parametrize(
    "arguments", [["-c", "import vllm"], ["vllm", "serve", "--config", "c.yaml"], ["vllm", "serve", "m", "--port"]]
)
def test_where_the_port_is_not_told_the_process_stands_in(arguments: list[str]) -> None:
    import os

    assert default_engine(arguments).endswith(f"-{os.getpid()}")


def test_children_inherit_the_name_that_their_parent_gave() -> None:
    environment: dict[str, str] = {}
    name = agree_on_engine(environment, ["vllm", "serve", "m", "--port", "8123"])
    assert agree_on_engine(environment, ["-c", "from multiprocessing.spawn import spawn_main"]) == name


def test_a_name_that_is_set_but_empty_is_not_set() -> None:
    environment = {"DP_BALANCER_ENGINE": ""}
    name = agree_on_engine(environment, ["vllm", "serve", "m", "--port", "8123"])
    assert name.endswith("-8123")
    assert environment["DP_BALANCER_ENGINE"] == name


def test_our_lines_go_where_vllms_go_unless_somebody_has_configured_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.NullHandler()
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("scheduler_hooks")
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "level", logging.INFO)
    for name in ("scheduler_hooks", "balancer"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    log_as_vllm()
    assert ours.handlers == [handler]
    assert not ours.propagate
    other = logging.NullHandler()
    ours.handlers = [other]
    log_as_vllm()
    assert ours.handlers == [other]


class Hook:
    """Takes hand-overs."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, dict[int, int]]] = []
        self.known: list[tuple[int | None, int | None]] = []

    def after_step(
        self,
        tokens: int,
        requests: int,
        received: dict[int, int],
        pending_tokens: int | None = None,
        kv_permille: int | None = None,
    ) -> None:
        self.said.append((tokens, requests, received))
        self.known.append((pending_tokens, kv_permille))

    def close(self) -> None:
        self.said.append((-1, -1, {}))


def live(request_id: str, tokens: int, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "sampling_params": SimpleNamespace(extra_args=more.pop("extra_args", None)),
        "is_finished": lambda: False,
        "status": SimpleNamespace(name="WAITING"),
        "num_computed_tokens": 0,
        "is_prefill_chunk": False,
    }
    return SimpleNamespace(request_id=request_id, num_tokens=tokens, **(fields | more))


def test_counts_follow_what_happens_to_requests() -> None:
    hook = Hook()
    counts = Counts({}, hook)  # type: ignore[arg-type]
    a, b = live("a", 100), live("b", 50)
    counts.received(a, True)
    counts.received(b, True)
    counts.received(b, False)
    counts.hand_over()
    output = SimpleNamespace(new_token_ids=[1, 2, 3])
    counts.generated([SimpleNamespace(outputs=[output, output])])
    counts.finished(b, 53)
    counts.changed_by(a, -1)
    counts.hand_over()
    assert hook.said == [(150, 2, {in_flight_id("a"): 100, in_flight_id("b"): 50}), (102, 1, {})]


def runs(request: Any, computed: int) -> None:
    """A step has taken up so many tokens of this request."""
    request.status = SimpleNamespace(name="RUNNING")
    request.num_computed_tokens = computed
    request.is_prefill_chunk = computed < request.num_tokens


def test_pending_is_what_waits_and_what_is_left_of_a_prompt_in_chunks() -> None:
    hook, requests = Hook(), {id_: live(id_, tokens) for id_, tokens in {"a": 100, "b": 50}.items()}
    counts = Counts(requests, hook)  # type: ignore[arg-type]
    for request in requests.values():
        counts.received(request, True)
    counts.hand_over()
    runs(requests["a"], 64)
    counts.changed(["a"])
    counts.hand_over()
    runs(requests["a"], 100)  # nobody says so: it is looked at until its last chunk is scheduled
    counts.hand_over()
    requests["a"].num_tokens = 101  # it generates, and what its next step computes was never a prompt
    counts.hand_over()
    requests["a"].status, requests["a"].num_computed_tokens = SimpleNamespace(name="PREEMPTED"), 0
    counts.changed(["a"])
    counts.hand_over()
    counts.finished(requests.pop("a"), 101)
    counts.hand_over()
    assert [pending for pending, _ in hook.known] == [150, 86, 50, 50, 151, 50]


def test_a_prompt_whose_kv_comes_from_elsewhere_is_looked_at_while_it_waits() -> None:
    hook, requests = Hook(), {"a": live("a", 100)}
    counts = Counts(requests, hook, fetches=True)  # type: ignore[arg-type]
    counts.received(requests["a"], True)
    counts.hand_over()
    requests["a"].num_computed_tokens = 96
    counts.hand_over()
    assert [pending for pending, _ in hook.known] == [100, 4]


def test_a_session_that_waits_for_its_client_has_nothing_pending() -> None:
    hook, requests = Hook(), {"a": live("a", 10)}
    counts = Counts(requests, hook)  # type: ignore[arg-type]
    counts.received(requests["a"], True)
    runs(requests["a"], 10)
    counts.changed(["a"])
    counts.hand_over()
    requests["a"].status, requests["a"].num_tokens = SimpleNamespace(name="WAITING_FOR_STREAMING_REQ"), 11
    counts.hand_over()
    requests["a"].status, requests["a"].num_tokens = SimpleNamespace(name="WAITING"), 60
    counts.changed_by(requests["a"], 49)
    counts.hand_over()
    assert [pending for pending, _ in hook.known] == [0, 0, 50]


def test_what_changed_unnoticed_is_pending_again_after_a_recount() -> None:
    hook, requests = Hook(), {"a": live("a", 100)}
    counts = Counts(requests, hook, recount_every=2)  # type: ignore[arg-type]
    counts.received(requests["a"], True)
    runs(requests["a"], 100)
    counts.changed(["a"])
    counts.hand_over()
    runs(requests["a"], 32)  # blocks that a transfer had spoilt
    counts.hand_over()
    runs(requests["a"], 64)
    counts.hand_over()
    assert [pending for pending, _ in hook.known] == [0, 68, 36]


def test_kv_usage_goes_in_thousandths_and_a_version_that_cannot_tell_loses_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot() -> float:
        raise AttributeError("block_pool")

    hook, strange = Hook(), live("a", 7)
    del strange.is_prefill_chunk
    runs_ = SimpleNamespace(name="RUNNING")
    counts = Counts({"a": strange}, hook, lambda: 0.4567)  # type: ignore[arg-type]
    counts.hand_over()
    counts.received(strange, True)
    strange.status = runs_
    counts.changed(["a"])
    counts.hand_over()
    Counts({}, hook, cannot).hand_over()  # type: ignore[arg-type]
    counts.finished(strange, 7)
    counts.hand_over()
    assert hook.known == [(0, 457), (None, 457), (0, None), (None, 457)]
    assert [said[:2] for said in hook.said] == [(0, 0), (7, 1), (0, 0), (0, 0)]
    assert "pending tokens are not reported" in caplog.text
    assert "KV usage is not reported" in caplog.text


def test_a_count_that_went_wrong_is_corrected_and_said(caplog: pytest.LogCaptureFixture) -> None:
    hook, requests = Hook(), {"a": live("a", 100)}
    counts = Counts(requests, hook, recount_every=2)  # type: ignore[arg-type]
    counts.received(requests["a"], True)
    requests["a"].num_tokens = 70  # by a scheduler that nobody knows
    counts.hand_over()
    counts.hand_over()
    assert [said[0] for said in hook.said] == [100, 70]
    assert counts.trouble.counts["recount"] == 1
    assert "corrected" in caplog.text


@pytest.mark.parametrize(
    ("request_id", "extra"),
    [("resp_1-0a", {"dp_balancer": marked("mine")}), (f"cmpl-{marked('mine')}-0-8d8f2f2f", None)],
)
def test_a_marked_request_ends_the_bookings_of_dispatchers_outside_and_inside(request_id: str, extra: Any) -> None:
    hook = Hook()
    counts = Counts({}, hook)  # type: ignore[arg-type]
    counts.received(live(request_id, 9, extra_args=extra), True)
    counts.hand_over()
    assert hook.said == [(9, 1, {in_flight_id("mine"): 9, in_flight_id(request_id): 0})]  # its tokens count once


class Scheduler:
    """The shape of vLLM's scheduler."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def schedule(self) -> Any:
        return SimpleNamespace(scheduled_new_reqs=[])

    def update_from_output(self) -> dict[int, Any]:
        return {}

    def finish_requests(self) -> list[Any]:
        for request in list(self.requests.values()):
            self._free_request(request)
        return []

    def _free_request(self, request: Any) -> None:
        del self.requests[request.request_id]


def test_a_scheduler_behaves_as_before_and_reports() -> None:
    hook = Hook()
    scheduler = reporting(Scheduler, lambda made: Counts(made.requests, hook))()  # type: ignore[arg-type]
    scheduler.add_request(live("a", 7))
    assert scheduler.schedule().scheduled_new_reqs == []
    assert scheduler.finish_requests() == []
    assert hook.said == [(7, 1, {in_flight_id("a"): 7}), (0, 0, {})]


def test_a_hook_that_cannot_begin_leaves_a_scheduler_that_works() -> None:
    def begin(scheduler: Any) -> Counts:
        raise InvalidInput("no")

    scheduler = reporting(Scheduler, begin)()
    scheduler.add_request(live("a", 7))
    assert scheduler.schedule().scheduled_new_reqs == []


def test_a_scheduler_of_another_shape_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Strange:
        def schedule(self) -> None: ...

    assert reporting(Strange, lambda made: None) is Strange  # type: ignore[arg-type, return-value]
    assert "no add_request" in caplog.text


def test_a_class_is_wrapped_once() -> None:
    once = reporting(Scheduler, lambda made: None)  # type: ignore[arg-type, return-value]
    assert reporting(once, lambda made: None) is once  # type: ignore[arg-type, return-value]


class Client:
    """The shape of vLLM's client of several EngineCores."""

    def __init__(self, ranks: list[int]) -> None:
        self.engine_ranks_managed = ranks
        self.core_engines = [bytes([rank]) for rank in ranks]
        self.reqs_in_flight: dict[str, Any] = {}
        self.sent: list[tuple[str, int | None]] = []
        self.fails: BaseException | None = None

    async def add_request_async(self, request: Any) -> None:
        if self.fails:
            raise self.fails
        self.sent.append((request.request_id, request.data_parallel_rank))


def asked(request_id: str, tokens: int = 5, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "prompt_token_ids": [1] * tokens,
        "prompt_embeds": None,
        "pooling_params": None,
        "resumable": False,
        "data_parallel_rank": None,
    }
    return SimpleNamespace(request_id=request_id, **(fields | more))


Join = Callable[..., Reporter]


Send = Callable[[Client, Any], Any]


@pytest.fixture
async def wrap() -> AsyncIterator[Callable[[Settings], Send]]:
    """The wrapped method of a client, by these settings; dispatchers are closed when the test ends."""
    made: list[InsideDispatcher] = []

    def begin(settings: Settings) -> InsideDispatcher:
        made.append(InsideDispatcher(settings, "e0"))
        return made[-1]

    yield lambda settings: dispatching(Client.add_request_async, lambda: begin(settings))
    for dispatcher in made:
        await dispatcher.aclose()


async def test_the_pool_chooses_the_rank_and_has_it_booked(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 4)
    client, send = Client([0, 1, 2, 3]), wrap(settings)
    for number in range(4):
        await send(client, asked(f"r{number}", tokens=100))
    assert sorted(rank for _, rank in client.sent if rank is not None) == [0, 1, 2, 3]
    assert dispatcher.snapshot().bookings == 4


async def test_a_node_that_serves_the_upper_ranks_counts_from_its_own_first(
    wrap: Any, settings: Settings, join: Join
) -> None:
    for index in (4, 5):
        join("e0", 1, index=index)
    client, send = Client([4, 5]), wrap(settings)
    await send(client, asked("a"))
    await send(client, asked("b"))
    assert sorted(rank for _, rank in client.sent if rank is not None) == [0, 1]


@pytest.mark.parametrize(
    "request_", [asked("a", pooling_params=object()), asked("a", resumable=True), asked("a", data_parallel_rank=2)]
)
async def test_what_is_not_ours_to_place_is_left_alone(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any, request_: Any
) -> None:
    join("e0", 4)
    client, before = Client([0, 1, 2, 3]), request_.data_parallel_rank
    await wrap(settings)(client, request_)
    assert client.sent == [("a", before)]
    assert dispatcher.snapshot().bookings == 0


async def test_without_redis_vllm_decides(wrap: Any, settings: Settings) -> None:
    away = Settings(url="redis://127.0.0.1:1/0", pool="p", budget_ms=50)
    client = Client([0, 1])
    await wrap(away)(client, asked("a"))
    assert client.sent == [("a", None)]


async def test_where_servers_share_a_pool_each_places_on_ranks_of_its_own(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("another", 2)
    join("e0", 2).report(1, [RankCounts(500, 5), RankCounts(600, 6)])
    client, send = Client([0, 1]), wrap(settings)
    await send(client, asked("a", tokens=200))
    await send(client, asked("b", tokens=10))
    assert {rank for _, rank in client.sent} == {0, 1}
    assert dispatcher.snapshot().bookings == 2


async def test_a_rank_that_this_server_cannot_reach_is_given_back_and_vllm_decides(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("another", 2)
    dispatcher.dispatch("a", 7)  # by somebody outside, with the same id
    join("e0", 2)
    client = Client([0, 1])
    await wrap(settings)(client, asked("a"))
    assert client.sent == [("a", None)]
    await until_none_booked(dispatcher)


async def until_none_booked(dispatcher: Any) -> None:
    async with asyncio.timeout(10):
        while dispatcher.snapshot().bookings:
            await asyncio.sleep(0.01)


async def test_a_send_that_fails_gives_its_booking_back(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2)
    client = Client([0, 1])
    client.fails = ConnectionError("gone")
    with pytest.raises(ConnectionError):
        await wrap(settings)(client, asked("a"))
    await until_none_booked(dispatcher)


async def test_a_client_that_goes_while_the_pool_is_asked_leaves_no_booking(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2)
    send = wrap(settings)
    await send(Client([0, 1]), asked("warm"))
    client = Client([0, 1])
    for turns in range(1, 6):  # cancelled before, during and after the EVAL
        task = asyncio.get_running_loop().create_task(send(client, asked(f"a{turns}")))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert client.sent == []
    dispatcher.release("warm")
    await until_none_booked(dispatcher)


class Processor:
    """The shape of vLLM's output processor."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def has_request(self, request_id: str) -> bool:
        return request_id in self.request_states

    def abort_requests(self, request_ids: list[str], internal: bool) -> list[str]:
        return [id_ for id_ in request_ids if self.request_states.pop(id_, None)]


class ApiServer:
    """The shape of vLLM's AsyncLLM: registers what it sends, and sends it."""

    def __init__(self, client: Client, send: Send) -> None:
        self.output_processor = Processor()
        self.client, self.send = client, send

    async def add_request(self, *requests: Any) -> str:
        for request in requests:
            self.output_processor.request_states[request.request_id] = request
        for request in requests:
            await self.send(self.client, request)
        return "collector"


add_request = registering(ApiServer.add_request)


async def test_a_client_that_goes_while_the_pool_is_asked_leaves_nothing_registered(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2)
    server = ApiServer(Client([0, 1]), wrap(settings))
    assert await add_request(server, asked("warm")) == "collector"
    for turns in range(1, 6):
        task = asyncio.ensure_future(add_request(server, asked(f"a{turns}")))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(server.output_processor.request_states) == ["warm"]
    dispatcher.release("warm")
    await until_none_booked(dispatcher)


async def test_what_is_aborted_while_the_pool_is_asked_is_not_sent_nor_are_its_siblings(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2)
    server = ApiServer(Client([0, 1]), wrap(settings))
    await add_request(server, asked("warm"))
    siblings = [asked(f"{number}_a") for number in range(3)]
    task = asyncio.ensure_future(add_request(server, *siblings))
    await asyncio.sleep(0)
    server.output_processor.abort_requests([request.request_id for request in siblings], internal=True)
    assert await task == "collector"
    assert [id_ for id_, _ in server.client.sent] == ["warm"]
    dispatcher.release("warm")
    await until_none_booked(dispatcher)


async def test_what_vllm_sends_without_registering_it_is_sent(wrap: Any, settings: Settings, join: Join) -> None:
    join("e0", 2)
    client, send = Client([0, 1]), wrap(settings)

    async def only_send(server: ApiServer, request: Any) -> None:
        await send(client, request)

    await registering(only_send)(ApiServer(client, send), asked("a"))
    assert [id_ for id_, _ in client.sent] == ["a"]


async def test_a_rank_that_has_gone_while_the_pool_was_asked_is_given_back(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2).report(1, [RankCounts(900, 9), RankCounts(0, 0)])
    client = Client([0, 1])
    task = asyncio.get_running_loop().create_task(wrap(settings)(client, asked("a")))
    await asyncio.sleep(0)
    client.core_engines.pop()
    await task
    assert client.sent == [("a", None)]
    await until_none_booked(dispatcher)


async def test_the_last_input_of_a_session_follows_the_session(
    wrap: Any, settings: Settings, join: Join, dispatcher: Any
) -> None:
    join("e0", 2)
    client = Client([0, 1])
    client.__dict__["streaming_reqs"] = {"a"}
    await wrap(settings)(client, asked("a"))
    assert client.sent == [("a", None)]
    assert dispatcher.snapshot().bookings == 0


async def test_a_dispatcher_that_cannot_begin_is_asked_once_and_vllm_decides(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[int] = []

    def begin() -> InsideDispatcher:
        begun.append(1)
        raise InvalidInput("no such certificate")

    client, send = Client([0, 1]), dispatching(Client.add_request_async, begin)
    for number in range(3):
        await send(client, asked(f"r{number}"))
    assert client.sent == [("r0", None), ("r1", None), ("r2", None)]
    assert len(begun) == 1
    assert len([message for message in caplog.messages if "no such certificate" in message]) == 1


def test_it_says_that_it_places_only_when_its_dispatcher_stands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from scheduler_hooks.vllm import attach

    def broken(settings: Settings, engine: str) -> InsideDispatcher:
        raise InvalidInput("no such certificate")

    monkeypatch.setattr(attach, "InsideDispatcher", broken)
    plugin = PluginSettings(Settings(url="redis://127.0.0.1:1/0", pool="p"))
    with caplog.at_level(logging.INFO), pytest.raises(InvalidInput):
        attach._begin_dispatcher(plugin, "e0")
    assert not caplog.messages


def fake_vllm(monkeypatch: pytest.MonkeyPatch, scheduler_config: type, parallel_config: type) -> None:
    """A vLLM of another version, as far as `register` looks."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.config", "vllm.v1", "vllm.v1.core.sched.scheduler")}
    modules |= {name: ModuleType(name) for name in ("vllm.v1.core", "vllm.v1.core.sched")}
    modules["vllm.config"].SchedulerConfig = scheduler_config  # type: ignore[attr-defined]
    modules["vllm.config"].ParallelConfig = parallel_config  # type: ignore[attr-defined]
    modules["vllm.v1.core.sched.scheduler"].Scheduler = Scheduler  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["vllm"].__version__ = "0.9.9"  # type: ignore[attr-defined]
    monkeypatch.setattr("scheduler_hooks.vllm.attach.log_as_vllm", lambda: None)
    monkeypatch.setenv("DP_BALANCER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DP_BALANCER_ENGINE", "e0")


class ThisSchedulerConfig:
    """One that can be attached to."""

    def get_scheduler_cls(self) -> type:
        return Scheduler


class ThisParallelConfig:
    """One that can be attached to."""

    __dataclass_fields__: dict[str, Any] = {"data_parallel_index": None}  # noqa: RUF012


def test_where_no_hook_is_attached_nothing_is_dispatched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from scheduler_hooks.vllm import register

    fake_vllm(monkeypatch, type("Config", (ThisSchedulerConfig,), {}), ThisParallelConfig)
    monkeypatch.setenv("DP_BALANCER_DISPATCH", "1")
    monkeypatch.setenv("DP_BALANCER_HOOK", "0")
    register()
    assert "API servers do NOT dispatch: nobody would acknowledge" in caplog.messages[-1]


def test_one_attachment_that_fails_does_not_make_the_others_line_untrue(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from scheduler_hooks.vllm import register

    config = type("Config", (ThisSchedulerConfig,), {})
    fake_vllm(monkeypatch, config, ThisParallelConfig)  # it has no client that could be wrapped
    monkeypatch.setenv("DP_BALANCER_DISPATCH", "1")
    register()
    line = caplog.messages[-1]
    assert "in vLLM 0.9.9" in line
    assert "schedulers report their loads; API servers do NOT dispatch: " in line
    assert issubclass(config().get_scheduler_cls(), Reporting)


def test_a_version_that_lacks_what_is_needed_is_refused_politely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from scheduler_hooks.vllm import register

    class SchedulerConfig: ...

    class ParallelConfig:
        __dataclass_fields__: dict[str, Any] = {}  # noqa: RUF012

    fake_vllm(monkeypatch, SchedulerConfig, ParallelConfig)
    with caplog.at_level(logging.INFO):
        register()
    line = caplog.messages[-1]
    assert "NOT reported" in line
    assert "get_scheduler_cls" in line
    assert "data_parallel_index" in line


def test_it_attaches_once_however_often_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler_hooks.vllm import register

    class SchedulerConfig(ThisSchedulerConfig): ...

    fake_vllm(monkeypatch, SchedulerConfig, ThisParallelConfig)
    register()
    first = SchedulerConfig.get_scheduler_cls
    register()
    assert SchedulerConfig.get_scheduler_cls is first
    made = SchedulerConfig().get_scheduler_cls()
    assert issubclass(made, Scheduler)
    assert SchedulerConfig().get_scheduler_cls() is made


def test_nothing_that_goes_wrong_in_register_reaches_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from scheduler_hooks.vllm import register

    monkeypatch.setenv("DP_BALANCER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DP_BALANCER_EVERY", "often")
    register()
    assert "DP_BALANCER_EVERY" in caplog.text


def test_without_an_address_it_does_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from scheduler_hooks.vllm import register

    monkeypatch.delenv("DP_BALANCER_URL", raising=False)
    register()
    assert not caplog.messages
