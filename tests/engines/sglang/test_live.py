"""dp-balancer inside a real SGLang: unmodified, on this machine's CPU, with DP attention and without.

One server per form; every test leaves it at rest. DPB_SGLANG_FORMS names the forms to run, all by default.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from balancer import BalancerError, Dispatcher, Placement, PoolSnapshot, Request, Settings, UnknownPool
from balancer.embedded import EmbeddedRedis
from tests.engines.sglang.link import Link
from tests.engines.sglang.load import Load
from tests.engines.sglang.probe import PROBE, costs, taken_in
from tests.engines.sglang.server import KIT, SGLangServer, what_is_missing

Eventually = Callable[..., float]

PORT = int(os.environ.get("DPB_SGLANG_PORT", "30010"))


@dataclass(frozen=True)
class Form:
    """How many ranks, by DP attention or by plain DP, in which form they report, and in which of SGLang's loops."""

    ranks: int
    has_attention: bool
    reports: str
    overlaps: bool = False

    @property
    def outlasting(self) -> int:
        """New tokens of a request that outlasts a Redis that is killed and started again; four ranks are slower."""
        return 2_000 // self.ranks

    @property
    def flags(self) -> tuple[str, ...]:
        count = str(self.ranks)
        return ("--tp", count, "--dp", count, "--enable-dp-attention") if self.has_attention else ("--dp", count)


FORMS = {
    "attention-gather": Form(2, True, "gather"),
    "attention-leader": Form(2, True, "leader"),
    "plain-dp": Form(2, False, "leader"),
    "attention-gather-4": Form(4, True, "gather"),
    "attention-leader-4": Form(4, True, "leader"),
    "overlap-gather": Form(2, True, "gather", overlaps=True),
    "overlap-leader": Form(2, True, "leader", overlaps=True),
}
CHOSEN = os.environ.get("DPB_SGLANG_FORMS", ",".join(FORMS)).split(",")
CHUNK = 256
LONGEST_HAND_OVER_S = 0.25
"""A step that waited for a Redis which does not answer would wait half a second at least, a try of the report's budget;
what is below is what two crowded cores may take from a thread."""


@pytest.fixture(scope="module", params=CHOSEN)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shape(form: str) -> Form:
    return FORMS[form]


@pytest.fixture(scope="module")
def server(form: str, link: Link, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    assert not what_is_missing(), what_is_missing()
    probed = tmp_path_factory.mktemp("probe")
    with SGLangServer(
        PORT,
        *FORMS[form].flags,
        "--chunked-prefill-size",
        str(CHUNK * (FORMS[form].ranks if FORMS[form].has_attention else 1)),  # SGLang divides it under DP attention
        DP_BALANCER_URL=link.url,
        DP_BALANCER_POOL=form,
        DP_BALANCER_ENGINE="e",
        DPB_PROBE_DIR=str(probed),
        PYTHONPATH=str(PROBE),
        SGLANG_PLUGINS="dp_balancer,dpb_probe",
        DP_BALANCER_FORM=FORMS[form].reports,
        DPB_OVERLAP="1" if FORMS[form].overlaps else "0",
    ) as server:
        yield server
        print(f"\n{form}\n{costs(probed)}")


@pytest.fixture
def outside(server: SGLangServer, redis_process: EmbeddedRedis, form: str) -> Iterator[Dispatcher]:
    """A dispatcher outside the engine, on the same pool, with a way to Redis of its own."""
    with Dispatcher(Settings(url=redis_process.url, pool=form, budget_ms=5_000)) as dispatcher:
        yield dispatcher


@pytest.fixture(autouse=True)
def _nothing_ends_by_its_lease(request: pytest.FixtureRequest) -> Iterator[None]:
    """A booking that its lease ends looks like one that was acknowledged; here every one is acknowledged."""
    if "outside" not in request.fixturenames or "killed_scheduler" in request.node.name:
        yield
        return
    outside: Dispatcher = request.getfixturevalue("outside")
    before = _expired(outside)
    yield
    assert _expired(outside) <= before, "a booking was left to its lease"  # less in a Redis that was emptied


def _expired(outside: Dispatcher) -> int:
    try:
        return outside.snapshot().expired
    except UnknownPool:
        return 0


def is_at_rest(snapshot: PoolSnapshot) -> bool:
    return snapshot.bookings == 0 and all(
        not (rank.holding_tokens or rank.in_flight_tokens or rank.requests or rank.in_flight_requests)
        for rank in snapshot.ranks
    )


def agrees(snapshot: PoolSnapshot, counted: dict[int, int]) -> bool:
    """Whether Redis' holding is what the schedulers say they hold."""
    return {int(rank.rank.rpartition("/")[2]): rank.holding_tokens for rank in snapshot.ranks} == counted


def requests_held(snapshot: PoolSnapshot) -> int:
    return sum(rank.requests for rank in snapshot.ranks)


def requests_in_flight(snapshot: PoolSnapshot) -> int:
    return sum(rank.in_flight_requests for rank in snapshot.ranks)


def test_it_says_once_what_is_attached(server: SGLangServer, shape: Form) -> None:
    assert len(server.said("dp-balancer places the requests of engine e")) == 1
    if shape.reports == "gather":
        assert len(server.said(f"dp-balancer reports e, {shape.ranks} ranks", "(gather form)")) == 1
    else:
        assert len(server.said("dp-balancer reports e/", "(leader form)")) == shape.ranks
    assert len(server.said("the overlap loop")) == (shape.ranks if shape.overlaps else 0)
    assert not server.said("does not gather")
    assert not server.said("the engine goes on without")


def test_under_load_nothing_fails_and_at_rest_nothing_is_left(
    server: SGLangServer, shape: Form, outside: Dispatcher, eventually: Eventually
) -> None:
    with Load(server, streams=3 * shape.ranks) as load:
        load.after(40)
    assert not load.failed
    assert {rank for rank, _ in load.answered} == set(range(shape.ranks))
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is held and nothing in flight")
    eventually(lambda: agrees(outside.snapshot(), server.counted()), "Redis has the schedulers' own counts")


def test_a_batch_is_spread_and_acknowledged(
    server: SGLangServer, shape: Form, outside: Dispatcher, eventually: Eventually
) -> None:
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    batch = [[9] * 30 for _ in range(5 * shape.ranks)]
    answers = server.post("/generate", {"input_ids": batch, "sampling_params": sampling})
    ranks = [answer["meta_info"]["dp_rank"] for answer in answers]
    assert sorted(ranks) == sorted(5 * list(range(shape.ranks)))
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


def test_while_a_long_prompt_is_prefilled_short_ones_go_to_the_other_ranks(
    server: SGLangServer, outside: Dispatcher, eventually: Eventually
) -> None:
    """SGLang's own count of it may draw them after it (`python -m tests.bench.sglang_long_prompt`)."""
    with ThreadPoolExecutor(10) as pool:
        long = pool.submit(server.generate, 6_000, 2)
        eventually(lambda: requests_held(outside.snapshot()), "it has been received")
        short = [pool.submit(server.generate, 100, 2) for _ in range(8)]
        ranks = [answer.result()["meta_info"]["dp_rank"] for answer in short]
        assert long.result()["meta_info"]["dp_rank"] not in ranks
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
    abort(server, "to-abort")
    sender.join(60)
    eventually(lambda: is_at_rest(outside.snapshot()), "the aborted request is gone")


def abort(server: SGLangServer, rid: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/abort_request", json.dumps({"rid": rid}), {"Content-Type": "application/json"})
        connection.getresponse().close()


def test_sglangs_own_bench_client_and_somebody_who_aborts_leave_nothing(
    server: SGLangServer, outside: Dispatcher, tmp_path: Path, eventually: Eventually
) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["--num-prompts", "60", "--request-rate", "inf", "--output-file", str(rows)]
    client = subprocess.Popen([str(KIT / "bench-sglang"), server.url, *words], stdout=subprocess.DEVNULL)
    aborted = 0
    with ThreadPoolExecutor(4) as pool:
        while client.poll() is None:
            ids = [f"abort-{aborted}-{number}" for number in range(4)]
            sent = [pool.submit(server.generate, 40, 3_000, rid=rid) for rid in ids]
            time.sleep(0.3)  # no condition: some are aborted in the queue, some when they run
            for rid in ids:
                abort(server, rid)
            while not all(answer.done() for answer in sent):  # one that had not come in when it was aborted
                time.sleep(0.3)
                for rid in ids:
                    abort(server, rid)
            aborted += len(ids)
    assert client.returncode == 0
    assert json.loads(rows.read_text().splitlines()[-1])["completed"] == 60
    assert aborted
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left of them")
    eventually(lambda: agrees(outside.snapshot(), server.counted()), "Redis has the schedulers' own counts")


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
    server: SGLangServer, shape: Form, outside: Dispatcher, eventually: Eventually
) -> None:
    # Not booked, or the controller would answer with the booking's rank, header or not.
    body = {"model": "tiny", "prompt": "hello there", "max_tokens": 400, "ignore_eos": True}
    for index in range(shape.ranks):
        with ThreadPoolExecutor(3) as pool:
            named = {"X_Data_Parallel_Rank": str(index)}
            answers = [pool.submit(server.post, "/v1/completions", body, **named) for _ in range(3)]
            eventually(lambda: requests_held(outside.snapshot()) == 3, "they run")
            held = {rank.rank: rank.requests for rank in outside.snapshot().ranks}
            assert held == {rank: 3 if rank == f"e/{index}" else 0 for rank in held}
            assert all(answer.result()["choices"] for answer in answers)
        eventually(lambda: is_at_rest(outside.snapshot()), "they are gone")


def test_on_the_openai_endpoints_a_booked_request_is_acknowledged(
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


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_of_generation_loses_nothing(
    server: SGLangServer, outside: Dispatcher, mode: str, eventually: Eventually
) -> None:
    """As before new weights: what runs waits, what comes meanwhile waits in SGLang's front, and is in flight."""
    expired = outside.snapshot().expired
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.generate, 30, 400) for _ in range(4)]
        eventually(
            lambda: requests_held(outside.snapshot()) >= 1, "they run, though a fast rank may soon have ended one"
        )
        server.post("/pause_generation", {"mode": mode})
        try:
            ids = [f"paused-{time.monotonic_ns()}-{number}" for number in range(4)]
            placements = [outside.dispatch(id_, 20) for id_ in ids]
            meanwhile = [
                pool.submit(server.generate, 20, 4, rid=placement.request.request_id, routed_dp_rank=placement.index)
                for placement in placements
            ]
            time.sleep(2)  # no condition to wait for: this is how long the pause lasts
            snapshot = outside.snapshot()
            waiting = [answer for answer in running + meanwhile if not answer.done()]
            assert set(meanwhile) < set(waiting), "the pause holds what has come since, and what ran"
            assert requests_held(snapshot) + requests_in_flight(snapshot) == len(waiting)
            assert requests_in_flight(snapshot) >= len(meanwhile)
            assert all(engine.age_ms < 2_000 for engine in snapshot.engines), "a paused engine is not a dead one"
        finally:
            server.post("/continue_generation", {})
        answers = [answer.result(120) for answer in running + meanwhile]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [400] * 4 + [4] * 4
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is left")
    assert outside.snapshot().expired == expired


# -- faults


@contextmanager
def another_redis(link: Link, back_to: EmbeddedRedis, directory: Path | None) -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to kill: the engine's way leads there for a while."""
    with EmbeddedRedis(directory=directory) as server:
        link.lead_to(server.port)
        try:
            yield server
        finally:
            link.lead_to(back_to.port)


@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "empty"])
def test_redis_killed_and_started_again_under_load_fails_no_request_and_is_exact_at_once(
    server: SGLangServer,
    link: Link,
    redis_process: EmbeddedRedis,
    form: str,
    shape: Form,
    keeps: bool,
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    with (
        another_redis(link, redis_process, tmp_path / "redis" if keeps else None) as killed,
        Dispatcher(Settings(url=killed.url, pool=form, budget_ms=5_000)) as looker,
        ThreadPoolExecutor(12) as pool,
    ):

        def seen() -> PoolSnapshot | None:
            with suppress(UnknownPool, BalancerError):
                return looker.snapshot()
            return None

        def shows(held: int) -> bool:
            snapshot = seen()
            return (
                snapshot is not None
                and len(snapshot.ranks) == shape.ranks
                and (requests_held(snapshot), requests_in_flight(snapshot)) == (held, 0)
            )

        # Given requests that run for long, one of them still on its way, and a stream of short ones
        tokens = shape.outlasting
        eventually(lambda: shows(0), "the engine has joined")
        long = [pool.submit(server.generate, 30, tokens) for _ in range(5)]
        eventually(lambda: shows(5), "they run")
        placement = looker.dispatch("on-its-way", 30)
        with Load(server, streams=3) as load:
            load.after(6)
            # When Redis is killed, and more come while it is away
            os.kill(killed.pid, signal.SIGKILL)
            long.append(pool.submit(server.generate, 30, tokens, rid="on-its-way", routed_dp_rank=placement.index))
            long += [pool.submit(server.generate, 30, tokens) for _ in range(4)]
            load.after(10)
        assert not load.failed
        eventually(lambda: server.requests() == 10, "the schedulers have them all, and no short one")
        killed.stop()
        killed.start()
        # Then it has what the schedulers have, within a second of its return (and what a crowded machine adds)
        took_s = eventually(lambda: shows(10), "it has what the schedulers have")
        print(f"\n    killed, back {'with its data' if keeps else 'empty'}: exact after {took_s * 1e3:,.0f} ms")
        assert took_s < 1.0 + 0.5
        with Load(server, streams=3) as load:
            load.after(6)
        assert not load.failed
        assert [answer.result(300)["meta_info"]["completion_tokens"] for answer in long] == [tokens] * 10
        eventually(lambda: is_at_rest(looker.snapshot()), "nothing is left")
        assert looker.snapshot().expired == 0
        eventually(lambda: agrees(looker.snapshot(), server.counted()), "Redis has the schedulers' own counts")


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
    longest_s = max(taken_in(Path(server.environment["DPB_PROBE_DIR"]))["hand_over"])
    print(f"\n    the longest hand-over of a step so far: {longest_s * 1e3:,.0f} ms")
    assert longest_s < LONGEST_HAND_OVER_S, "a step has waited for Redis"


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


def test_a_scheduler_that_hangs_leaves_the_pool_with_those_that_wait_for_it_until_it_goes_on(
    server: SGLangServer, shape: Form, outside: Dispatcher, eventually: Eventually
) -> None:
    """Under DP attention the others stand in a collective: they live, and would be sent requests."""

    def silent() -> int:
        return sum(engine.age_ms > 5_000 for engine in outside.snapshot().engines)

    running = threading.Thread(target=server.generate, args=(30, 600))
    running.start()
    eventually(lambda: requests_held(outside.snapshot()) == 1, "it runs")
    hung = server.pids("sglang::scheduler")[-1]
    os.kill(hung, signal.SIGSTOP)
    try:
        expected = len(outside.snapshot().engines) if shape.has_attention else 1
        took_s = eventually(lambda: silent() == expected, "their leases have ended", within_s=90)
        print(f"\n    hung: out of the pool after {took_s:,.0f} s")
    finally:
        os.kill(hung, signal.SIGCONT)
    eventually(lambda: silent() == 0, "they are back")
    running.join(120)
    eventually(lambda: is_at_rest(outside.snapshot()), "nothing is lost, nothing is left")


def test_a_killed_scheduler_leaves_the_pool_with_its_lease_and_a_restart_begins_anew(
    server: SGLangServer, outside: Dispatcher, shape: Form, eventually: Eventually
) -> None:
    epochs = {engine.name: engine.epoch for engine in outside.snapshot().engines}
    outside.dispatch_many([Request(f"ghost-{number}", 100) for number in range(10)])
    os.kill(server.pids("sglang::scheduler")[0], signal.SIGKILL)
    # Under DP attention nobody steps without it: the others' leases end too, or they leave where SGLang ends them.
    alive = 0 if shape.has_attention else len(epochs) - 1
    eventually(lambda: sum(e.age_ms <= 5_000 for e in outside.snapshot().engines) == alive, "its lease has ended", 90)
    if not shape.has_attention:  # SGLang goes on and does not notice: its own round robin would go on sending there
        answers = [server.generate(20, 2) for _ in range(8)]
        assert len({answer["meta_info"]["dp_rank"] for answer in answers}) == shape.ranks - 1
    server.stop()
    server.start()
    eventually(lambda: len(outside.snapshot().ranks) == shape.ranks, "its ranks are back")
    snapshot = outside.snapshot()
    assert all(engine.epoch > epochs[engine.name] for engine in snapshot.engines)
    assert all(rank.load_tokens == 0 for rank in snapshot.ranks), "ghosts of the old life count for nobody"
    assert server.generate(10, 2)["meta_info"]["finish_reason"]
