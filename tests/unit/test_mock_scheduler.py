"""The mock engine without its processes: queues, prices, keeping step, and what a rank tells the hook."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer import in_flight_id
from scheduler_hooks.mock_engine.barrier import Agreement, BarrierPipes, EngineGone, HasFileno, RankRow
from scheduler_hooks.mock_engine.connections import ClientConnections
from scheduler_hooks.mock_engine.cost import CostModel, StepWork
from scheduler_hooks.mock_engine.rank import Rank
from scheduler_hooks.mock_engine.scheduler import RankScheduler, Rejected
from scheduler_hooks.mock_engine.wire import (
    Abort,
    Arrival,
    BadMessage,
    abort_line,
    arrival_line,
    error_line,
    parse_event,
    parse_message,
    step_line,
)

# --- queues ---------------------------------------------------------------------------------------------


def test_a_prompt_being_prefilled_in_chunks_counts_whole_from_its_receipt() -> None:
    rank = RankScheduler(chunk_tokens=256)
    rank.receive("r", 1_500, 10)
    held, prefilled = [rank.holding_tokens], []
    for _ in range(6):
        prefilled.append(rank.step().work.prefill_tokens)
        held.append(rank.holding_tokens)
    assert prefilled == [256, 256, 256, 256, 256, 220]
    assert held == [1_500, 1_500, 1_500, 1_500, 1_500, 1_500, 1_501]


def test_the_last_chunk_yields_the_first_token_and_decoding_the_others() -> None:
    rank = RankScheduler(chunk_tokens=100)
    rank.receive("r", 150, 3)
    steps = [rank.step() for _ in range(4)]
    assert [dict(step.tokens) for step in steps] == [{}, {"r": 1}, {"r": 2}, {"r": 3}]
    assert steps[2].work == StepWork(kv_tokens=151, requests=1)
    assert steps[3].finished == ("r",)
    assert (rank.holding_tokens, rank.kv_tokens, rank.requests) == (0, 0, 0)


def test_a_chunk_takes_several_prompts_and_cuts_only_the_last() -> None:
    rank = RankScheduler(chunk_tokens=100)
    for name in "abc":
        rank.receive(name, 60, 5)
    first = rank.step()
    assert first.work == StepWork(prefill_tokens=100, requests=2)
    assert dict(first.tokens) == {"a": 1}
    second = rank.step()
    assert second.work == StepWork(prefill_tokens=80, requests=2)
    assert dict(second.tokens) == {"b": 1, "c": 1}


def test_prefill_goes_first_and_decoding_pauses() -> None:
    rank = RankScheduler(chunk_tokens=100)
    rank.receive("old", 10, 5)
    rank.step()
    rank.receive("new", 150, 5)
    assert [sorted(rank.step().tokens) for _ in range(3)] == [[], ["new"], ["new", "old"]]


def test_a_request_waits_until_the_kv_pool_has_room_for_all_of_it() -> None:
    rank = RankScheduler(kv_capacity_tokens=100)
    rank.receive("first", 50, 3)
    rank.receive("second", 40, 10)
    assert dict(rank.step().tokens) == {"first": 1}
    assert rank.holding_tokens == 91, "the waiting prompt is held too"
    assert dict(rank.step().tokens) == {"first": 2}
    assert rank.step().finished == ("first",)
    assert dict(rank.step().tokens) == {"second": 1}


def test_a_request_that_never_fits_and_an_id_in_use_are_rejected() -> None:
    rank = RankScheduler(kv_capacity_tokens=100)
    with pytest.raises(Rejected, match="needs 101 KV tokens"):
        rank.receive("big", 90, 11)
    rank.receive("r", 50, 50)
    with pytest.raises(Rejected, match="here already"):
        rank.receive("r", 1, 1)
    assert (rank.holding_tokens, rank.requests) == (50, 1)


def test_an_abort_takes_back_everything_wherever_the_request_is() -> None:
    rank = RankScheduler(kv_capacity_tokens=300, chunk_tokens=100)
    rank.receive("running", 50, 10)
    rank.step()
    rank.receive("cut", 150, 10)
    rank.receive("waiting", 10, 10)
    rank.step()
    for name, left in [("cut", 61), ("waiting", 51), ("running", 0)]:
        assert rank.abort(name)
        assert rank.holding_tokens == left
    assert (rank.kv_tokens, rank.requests) == (0, 0)
    assert not rank.abort("running")
    rank.receive("next", 200, 100)  # fits only if nothing is reserved any more
    rank.step()
    assert rank.kv_tokens == 100


def test_nothing_to_do_is_an_idle_step() -> None:
    assert RankScheduler().step().work == StepWork()


Operation = tuple[str, int, int]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.integers(1, 120), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_tokens_are_conserved_and_every_request_gets_its_answer(operations: list[Operation]) -> None:
    rank = RankScheduler(kv_capacity_tokens=200, chunk_tokens=50)
    held: dict[str, list[int]] = {}  # name -> input, output, generated
    received = 0

    def step() -> None:
        outcome = rank.step()
        for name, count in outcome.tokens.items():
            held[name][2] += 1
            assert count == held[name][2]
        for name in outcome.finished:
            _, output_tokens, generated = held.pop(name)
            assert generated == output_tokens
        assert outcome.work.prefill_tokens <= 50

    for operation, first, second in [*operations, *[("step", 0, 0)] * 400]:
        if operation == "receive":
            rank.receive(f"r{received}", first, second)
            held[f"r{received}"] = [first, second, 0]
            received += 1
        elif operation == "abort":
            assert rank.abort(f"r{first}") == (held.pop(f"r{first}", None) is not None)
        else:
            step()
        assert rank.holding_tokens == sum(prompt + generated for prompt, _, generated in held.values())
        assert rank.requests == len(held)
        assert 0 <= rank.kv_tokens <= 200
        if operation == "step" and not held:
            assert rank.kv_tokens == 0
    while held:  # ends: each step gives somebody a token or a chunk
        step()


# --- prices ---------------------------------------------------------------------------------------------


def test_a_request_costs_as_much_as_900_to_2200_kv_tokens() -> None:
    cost = CostModel()
    assert 900 <= cost.request_us * 1_000 / cost.kv_ns <= 2_200


def test_the_price_of_a_step_is_the_sum_of_its_parts() -> None:
    cost = CostModel(base_ms=20, prefill_us=70, kv_ns=20, request_us=30)
    assert cost.step_ms(StepWork()) == 0
    assert cost.step_ms(StepWork(kv_tokens=400_000, requests=100)) == pytest.approx(20 + 8 + 3)
    assert cost.step_ms(StepWork(prefill_tokens=8_192, requests=2)) == pytest.approx(20 + 573.44 + 0.06)


# --- keeping step ---------------------------------------------------------------------------------------


class Clients:
    """A pipe in the place of a rank's connections."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def say_something(self) -> None:
        os.write(self._write, b"!")

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def clients() -> Iterator[list[Clients]]:
    made = [Clients() for _ in range(3)]
    yield made
    for one in made:
        one.close()


def meet(
    pipes: BarrierPipes, step_ms: list[int], clients: list[Clients], idle_tick_ms: float = 1.0, speed: float = 1.0
) -> list[list[Agreement]]:
    """Two steps of all ranks, each in a thread; returns each rank's agreements."""
    agreements: list[list[Agreement]] = [[] for _ in step_ms]

    def rank(index: int) -> None:
        barrier = pipes.barrier(index, speed, idle_tick_ms)
        for _ in range(2):
            row = RankRow(step_ms[index] * 1_000_000, 10 * index, index)
            agreements[index].append(barrier.agree(row, clients[index]))

    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(len(step_ms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return agreements


def test_a_step_takes_as_long_as_its_slowest_rank(clients: list[Clients]) -> None:
    agreements = meet(BarrierPipes(3), [500, 9_000, 0], clients)
    assert len({tuple((a.step, a.end_ns, a.stop) for a in of_rank) for of_rank in agreements}) == 1
    first, second = agreements[0]
    assert second.end_ns - first.end_ns == 9_000 * 1_000_000
    assert [(row.holding_tokens, row.requests) for row in second.rows] == [(0, 0), (10, 1), (20, 2)]


def test_speed_divides_the_length_of_a_step(clients: list[Clients]) -> None:
    first, second = meet(BarrierPipes(3), [0, 9_000, 0], clients, speed=3)[2]
    assert second.end_ns - first.end_ns == 3_000 * 1_000_000


def test_a_client_ends_the_idle_tick_for_all(clients: list[Clients]) -> None:
    clients[2].say_something()
    agreements = meet(BarrierPipes(3), [0, 0, 0], clients, idle_tick_ms=3_600_000)
    assert [a.idle for a in agreements[0]] == [True, True]


def test_all_hear_of_a_stop_in_the_same_step(clients: list[Clients]) -> None:
    pipes = BarrierPipes(3)
    pipes.stop()
    agreements = meet(pipes, [5, 5, 5], clients, idle_tick_ms=3_600_000)
    assert {of_rank[0].stop for of_rank in agreements} == {True}


def test_a_lone_rank_hears_of_a_stop_however_busy(clients: list[Clients]) -> None:
    pipes = BarrierPipes(1)
    pipes.stop()
    assert meet(pipes, [5], clients)[0][0].stop


def test_rank_0_notices_that_the_engine_has_ended(clients: list[Clients]) -> None:
    pipes = BarrierPipes(2)
    os.close(pipes._alive_write)
    with pytest.raises(EngineGone):
        pipes.barrier(0, 1.0, 1.0).agree(RankRow(0, 0, 0), clients[0])


# --- lines ----------------------------------------------------------------------------------------------


def test_messages_survive_the_wire() -> None:
    assert parse_message(arrival_line("r1", 900, 120)) == Arrival("r1", 900, 120)
    assert parse_message(abort_line("r1")) == Abort("r1")
    event = parse_event(step_line(12, 81.25, [("r1", 3)], ["r0"], []))
    assert (event.step, event.t, list(map(tuple, event.tokens)), event.finished) == (12, 81.25, [("r1", 3)], ["r0"])
    assert parse_event(error_line("no", None)).error == "no"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not a line of JSON"),
        (b"[1]", "a message is a JSON object"),
        (b'{"abort": 7}', "abort must be text"),
        (b'{"request_id": "", "input_tokens": 1, "output_tokens": 1}', "request_id must be text of 1 to 512 bytes"),
        (b'{"request_id": "r", "input_tokens": 1}', "output_tokens must be a whole number"),
        (b'{"request_id": "r", "input_tokens": 1.5, "output_tokens": 1}', "input_tokens must be a whole number"),
        (b'{"request_id": "r", "input_tokens": true, "output_tokens": 1}', "input_tokens must be a whole number"),
        (b'{"request_id": "r", "input_tokens": 1, "output_tokens": 0}', "output_tokens must be a whole number"),
        (b'{"request_id": "r", "input_tokens": 1, "output_tokens": 1e400}', "not a line of JSON"),
    ],
)
def test_a_bad_message_is_refused_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(BadMessage, match=reason):
        parse_message(line)


# --- a rank and its hook --------------------------------------------------------------------------------


class RecordingHook:
    def __init__(self) -> None:
        self.reports: list[tuple[int, int, dict[int, int]]] = []
        self.closed = False

    def after_step(self, holding_tokens: int, requests: int, received_ids: Mapping[int, int]) -> None:
        self.reports.append((holding_tokens, requests, dict(received_ids)))

    def close(self) -> None:
        self.closed = True


class Script:
    """A barrier that ends each step at once, and does between steps what a test wants done."""

    def __init__(self, *between: Callable[[], None]) -> None:
        self._between = list(between)
        self._step = 0

    def agree(self, row: RankRow, clients: HasFileno) -> Agreement:
        self._step += 1
        if self._between:
            self._between.pop(0)()
        return Agreement(self._step, self._step, stop=not self._between)


class Bench:
    """One rank with one connected client."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(listener.getsockname())
        self.client.settimeout(10)
        self.scheduler = RankScheduler(kv_capacity_tokens=1_000, chunk_tokens=100)
        self.connections = ClientConnections(listener)
        self.hook = RecordingHook()

    def serve(self, *between: Callable[[], None]) -> list[dict[str, object]]:
        """Run a step per item of `between` (done while it lasts) and one more; returns what the client was told."""
        rank = Rank(self.connections, self.scheduler, CostModel(), Script(*between, nothing), self.hook)
        rank.serve(ready=nothing)
        rank.close()
        with self.client, self.client.makefile("rb") as lines:
            return [json.loads(line) for line in lines]

    def send(self, *lines: bytes) -> Callable[[], None]:
        return lambda: self.client.sendall(b"".join(lines))


def nothing() -> None:
    pass


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.client.close()


def test_the_hook_gets_what_was_received_at_the_boundary_with_its_tokens(bench: Bench) -> None:
    bench.serve(bench.send(arrival_line("a", 250, 9), arrival_line("b", 40, 1)), nothing, nothing, nothing)
    assert bench.hook.reports == [
        (0, 0, {}),  # they came while this step ran: not seen
        (290, 2, {in_flight_id("a"): 250, in_flight_id("b"): 40}),
        (290, 2, {}),
        (251, 1, {}),  # b was prefilled beside a's last chunk, and its only token ended it
        (252, 1, {}),
    ]
    assert bench.hook.closed


def test_a_request_that_leaves_in_its_first_step_is_acknowledged_with_nothing_held(bench: Bench) -> None:
    told = bench.serve(bench.send(arrival_line("short", 10, 1), arrival_line("gone", 10, 5), abort_line("gone")))
    assert bench.hook.reports[1] == (0, 0, {in_flight_id("short"): 0, in_flight_id("gone"): 0})
    assert told == [{"step": 2, "t": 2e-9, "tokens": [["short", 1]], "finished": ["short"], "aborted": ["gone"]}]


def test_a_rejected_request_is_answered_and_in_flight_no_longer(bench: Bench) -> None:
    told = bench.serve(bench.send(arrival_line("big", 999, 9), b"nonsense\n", arrival_line("fits", 10, 9)))
    assert bench.hook.reports[1] == (11, 1, {in_flight_id("big"): 0, in_flight_id("fits"): 11})
    assert [line.get("request_id", "-") for line in told] == ["big", None, "-"]


def test_a_second_request_of_an_id_that_is_here_is_refused_and_not_acknowledged_again(bench: Bench) -> None:
    told = bench.serve(bench.send(arrival_line("r", 10, 9)), bench.send(arrival_line("r", 10, 9)))
    assert [report[2] for report in bench.hook.reports] == [{}, {in_flight_id("r"): 11}, {}]
    assert "here already" in str(told[1]["error"])


def test_a_closed_connection_aborts_its_requests(bench: Bench) -> None:
    def hang_up() -> None:
        bench.client.shutdown(socket.SHUT_WR)

    bench.serve(bench.send(arrival_line("a", 500, 9), arrival_line("b", 40, 9)), hang_up)
    assert [report[:2] for report in bench.hook.reports] == [(0, 0), (540, 2), (0, 0)]


def test_a_line_without_an_end_closes_the_connection(bench: Bench) -> None:
    told = bench.serve(bench.send(b"x" * 70_000), nothing)
    assert told == []
