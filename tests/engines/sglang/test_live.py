"""dp-balancer inside a real SGLang: unmodified, on this machine's CPU, with DP attention and without.

One server per form; every test leaves it at rest. DPB_SGLANG_FORMS names the forms to run, all by default.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
import redis

from balancer import Dispatcher, Placement, PoolSnapshot, Request, Settings, UnknownPool
from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.link import Link
from tests.engines.sglang.load import Load
from tests.engines.sglang.probe import PROBE, costs
from tests.engines.sglang.server import SGLangServer, what_is_missing

Eventually = Callable[..., float]

PORT = int(os.environ.get("DPB_SGLANG_PORT", "30010"))
FORMS = {
    "attention-gather": (("--tp", "2", "--dp", "2", "--enable-dp-attention"), {"DP_BALANCER_FORM": "gather"}),
    "attention-leader": (("--tp", "2", "--dp", "2", "--enable-dp-attention"), {"DP_BALANCER_FORM": "leader"}),
    "plain-dp": (("--dp", "2"), {}),
}
CHOSEN = os.environ.get("DPB_SGLANG_FORMS", ",".join(FORMS)).split(",")
CHUNK = 128


@pytest.fixture(scope="module", params=CHOSEN)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(form: str, link: Link, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    assert not what_is_missing(), what_is_missing()
    flags, environment = FORMS[form]
    probed = tmp_path_factory.mktemp("probe")
    with SGLangServer(
        PORT,
        *flags,
        "--chunked-prefill-size",
        str(2 * CHUNK),
        DP_BALANCER_URL=link.url,
        DP_BALANCER_POOL=form,
        DP_BALANCER_ENGINE="e",
        DPB_PROBE_DIR=str(probed),
        PYTHONPATH=str(PROBE),
        SGLANG_PLUGINS="dp_balancer,dpb_probe",
        **environment,
    ) as server:
        yield server
        print(f"\n{form}\n{costs(probed)}")


@pytest.fixture
def outside(server: SGLangServer, redis_process: EmbeddedRedis, form: str) -> Iterator[Dispatcher]:
    """A dispatcher outside the engine, on the same pool, with a way to Redis of its own."""
    with Dispatcher(Settings(url=redis_process.url, pool=form, budget_ms=5_000)) as dispatcher:
        yield dispatcher


def is_at_rest(snapshot: PoolSnapshot) -> bool:
    return snapshot.bookings == 0 and all(
        not (rank.holding_tokens or rank.in_flight_tokens or rank.requests or rank.in_flight_requests)
        for rank in snapshot.ranks
    )


def agrees(snapshot: PoolSnapshot, counted: dict[int, int]) -> bool:
    """Whether Redis' holding is what the schedulers say they hold."""
    return {int(rank.rank.rpartition("/")[2]): rank.holding_tokens for rank in snapshot.ranks} == counted


def test_it_says_once_what_is_attached(server: SGLangServer, form: str) -> None:
    assert len(server.said("dp-balancer places the requests of engine e")) == 1
    if form == "attention-gather":
        assert len(server.said("dp-balancer reports e, 2 ranks", "(gather form)")) == 1
    else:
        assert len(server.said("dp-balancer reports e/", "(leader form)")) == 2
    assert not server.said("does not gather")
    assert not server.said("the engine goes on without")


def test_under_load_nothing_fails_and_at_rest_nothing_is_left(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    with Load(server, streams=6) as load:
        load.after(40)
    assert not load.failed
    assert {rank for rank, _ in load.answered} == {0, 1}
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is held and nothing in flight")
    eventually(lambda: agrees(outside.snapshot(), server.counted()), "Redis has the schedulers' own counts")


def test_a_batch_is_spread_and_acknowledged(server: SGLangServer, outside: Dispatcher, eventually: Eventually) -> None:
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    answers = server.post("/generate", {"input_ids": [[9] * 30 for _ in range(10)], "sampling_params": sampling})
    ranks = [answer["meta_info"]["dp_rank"] for answer in answers]
    assert sorted(ranks) == [0] * 5 + [1] * 5
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")


def test_while_a_long_prompt_is_prefilled_its_rank_counts_all_of_it(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    """SGLang itself counts the chunks done so far: 256 of 3,000 after the first one."""
    seen: list[int] = []
    sender = threading.Thread(target=server.generate, args=(3_000, 2))
    sender.start()
    while sender.is_alive():
        seen.append(max(rank.load_tokens for rank in outside.snapshot().ranks))
        time.sleep(0.002)
    sender.join()
    first = next(at for at, load in enumerate(seen) if load)
    last = len(seen) - next(at for at, load in enumerate(reversed(seen)) if load)
    assert min(seen[first:last]) >= 3_000
    assert max(seen) <= 3_010
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")


def test_a_client_that_hangs_up_leaves_nothing(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    sampling = {"max_new_tokens": 4_000, "ignore_eos": True}
    body = json.dumps({"input_ids": [11] * 40, "sampling_params": sampling, "stream": True})
    for _ in range(4):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                answer.read(20)
    eventually(lambda: is_at_rest(outside.snapshot()), "the aborted requests are gone", within_s=90)


def test_an_aborted_request_leaves_nothing(server: SGLangServer, outside: Dispatcher, eventually: Eventually) -> None:
    sender = threading.Thread(target=server.generate, args=(40, 3_000), kwargs={"rid": "to-abort"})
    sender.start()
    eventually(lambda: not is_at_rest(outside.snapshot()), "it is there")
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/abort_request", '{"rid": "to-abort"}', {"Content-Type": "application/json"})
        connection.getresponse().close()
    sender.join(60)
    eventually(lambda: is_at_rest(outside.snapshot()), "the aborted request is gone")


def test_an_outside_dispatcher_names_the_rank_and_the_schedulers_hook_acknowledges(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    ids = [f"outside-{time.monotonic_ns()}-{number}" for number in range(6)]
    for id_ in ids:
        placement = outside.dispatch(id_, 25)
        assert isinstance(placement, Placement)
        answer = server.generate(25, 2, rid=id_, routed_dp_rank=placement.index)
        assert answer["meta_info"]["dp_rank"] == placement.index
    eventually(lambda: is_at_rest(outside.snapshot()), "each was acknowledged, none booked twice")
    assert outside.snapshot().expired == 0


def test_on_the_openai_endpoints_a_header_names_the_rank(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    for number in range(4):
        id_ = f"openai-{time.monotonic_ns()}-{number}"
        placement = outside.dispatch(id_, 5)
        body = {"model": "tiny", "prompt": "hello there", "max_tokens": 2, "rid": id_}
        server.post("/v1/completions", body, X_Data_Parallel_Rank=str(placement.index))
    eventually(lambda: is_at_rest(outside.snapshot()), "each was acknowledged")


def test_ids_that_repeat_and_ids_that_are_rewritten_come_to_nothing(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    for _ in range(3):
        server.generate(10, 2, rid="the-same-again")
    sampling = {"max_new_tokens": 2, "n": 3}
    server.post("/generate", {"text": "hello there", "sampling_params": sampling})
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")


def test_a_prompt_that_is_too_long_is_refused_and_leaves_nothing(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    with pytest.raises(Exception, match="HTTP Error 400"):
        server.generate(200_000, 1)
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")


# -- faults


def test_redis_black_holed_cut_and_emptied_under_load_fails_no_request(
    server: SGLangServer, link: Link, outside: Dispatcher, plain: redis.Redis, eventually: Eventually
) -> None:
    def steps() -> dict[str, int]:
        with suppress(UnknownPool):
            return {engine.name: engine.step for engine in outside.snapshot().engines}
        return {}

    def all_have_stepped_since(before: dict[str, int]) -> bool:
        now = steps()
        return len(now) >= len(before) and all(step > before.get(name, -1) for name, step in now.items())

    with Load(server, streams=4) as load:
        for fault in (link.black_hole, link.cut):
            load.after(6)
            fault()
            load.after(10)
            before = steps()
            link.mend()
            took_s = eventually(lambda known=before: all_have_stepped_since(known), "the engine reports again")
            print(f"\n    {fault.__name__}: reported again after {took_s * 1e3:,.0f} ms")
        before = steps()
        plain.flushall()
        took_s = eventually(lambda known=before: all_have_stepped_since(known), "an emptied Redis is filled again")
        print(f"\n    emptied: whole again after {took_s * 1e3:,.0f} ms")
        load.after(6)
    assert not load.failed
    eventually(lambda: agrees(outside.snapshot(), server.counted()), "Redis has the schedulers' own counts")
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left", within_s=120)


def test_redis_paused_under_load_fails_no_request(
    server: SGLangServer, redis_process: EmbeddedRedis, outside: Dispatcher, eventually: Eventually
) -> None:
    with Load(server, streams=4) as load:
        load.after(6)
        os.kill(redis_process.pid, signal.SIGSTOP)
        try:
            load.after(10)
        finally:
            os.kill(redis_process.pid, signal.SIGCONT)
        load.after(6)
    assert not load.failed
    eventually(lambda: agrees(outside.snapshot(), server.counted()), "Redis has the schedulers' own counts")
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left", within_s=120)


def test_a_killed_scheduler_leaves_the_pool_with_its_lease_and_a_restart_begins_anew(
    server: SGLangServer, outside: Dispatcher, form: str, eventually: Eventually
) -> None:
    epochs = {engine.name: engine.epoch for engine in outside.snapshot().engines}
    outside.dispatch_many([Request(f"ghost-{number}", 100) for number in range(10)])
    os.kill(server.pids("sglang::scheduler")[0], signal.SIGKILL)
    eventually(lambda: all(engine.age_ms > 5_000 for engine in outside.snapshot().engines), "its leases have ended", 90)
    server.stop()
    server.start()
    eventually(lambda: len(outside.snapshot().ranks) == 2, "both ranks are back")
    snapshot = outside.snapshot()
    assert all(engine.epoch > epochs[engine.name] for engine in snapshot.engines)
    assert all(rank.load_tokens == 0 for rank in snapshot.ranks), "ghosts of the old life count for nobody"
    assert server.generate(10, 2)["meta_info"]["finish_reason"]
