"""The mock engine as real processes: requests over sockets, and every way in which it can end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from balancer import Dispatcher, Settings
from scheduler_hooks.mock_engine import MockEngineClient, RankEvent

RANKS = 4
COMMAND = [sys.executable, "-m", "scheduler_hooks.mock_engine", "--ranks", str(RANKS)]
FAST = ["--no-hook", "--base-ms", "2", "--prefill-us", "1", "--idle-tick-ms", "20"]

Eventually = Callable[..., None]


@dataclass
class Engine:
    process: subprocess.Popen[bytes]
    rank_ports: list[int]
    pids: list[int]


def alive(pid: int) -> bool:
    """Whether the process still runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start_engine(*options: str) -> Engine:
        process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE)
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        assert (ready["ready"], ready["ranks"], ready["engine"]) == (True, RANKS, "mock-0")
        assert ready["address"] == f"127.0.0.1:{ready['rank_ports'][0]}"
        engine = Engine(process, ready["rank_ports"], ready["pids"])
        started.append(engine)
        return engine

    yield start_engine
    for engine in started:
        with engine.process:
            engine.process.kill()
        for pid in engine.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def collect(
    client: MockEngineClient, until: Callable[[list[tuple[int, RankEvent]]], bool]
) -> list[tuple[int, RankEvent]]:
    """What the ranks say until the condition holds, within 20 s."""
    said: list[tuple[int, RankEvent]] = []
    async with asyncio.timeout(20):
        async for event in client.events():
            said.append(event)
            if until(said):
                return said
    raise AssertionError(f"the engine hung up after {said}")


def finished(said: list[tuple[int, RankEvent]]) -> list[str]:
    return [name for _, event in said for name in event.finished]


async def test_requests_finish_on_their_rank_with_as_many_tokens_as_they_asked_for(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    stats = tmp_path / "steps.jsonl"
    engine = start(*FAST, "--stats", str(stats), "--chunk", "512")
    wanted = {f"r{number}": (number % RANKS, 1 + 97 * number, 1 + number % 7) for number in range(40)}
    async with await MockEngineClient.connect(engine.rank_ports) as client:
        for name, (rank, input_tokens, output_tokens) in wanted.items():
            client.send(rank, name, input_tokens, output_tokens)
        said = await collect(client, lambda said: len(finished(said)) == len(wanted))
    for name, (rank, _, output_tokens) in wanted.items():
        counts = [(at, count) for at, event in said for token, count in event.tokens if token == name]
        assert counts == [(rank, count) for count in range(1, output_tokens + 1)]
    ends: dict[int, set[float]] = {}
    for _, event in said:
        ends.setdefault(event.step, set()).add(event.t)
    assert all(len(instants) == 1 for instants in ends.values()), "a step ends at one instant for all ranks"

    steps = [json.loads(line) for line in stats.read_text().splitlines()]
    assert [step["step"] for step in steps] == sorted({step["step"] for step in steps})
    assert all(len(step["held"]) == len(step["requests"]) == RANKS for step in steps)
    assert max(sum(step["held"]) for step in steps) <= sum(prompt + answer for _, prompt, answer in wanted.values())
    assert (steps[-1]["held"], steps[-1]["requests"]) == ([0] * RANKS, [0] * RANKS)


async def test_a_long_prompt_on_one_rank_slows_the_step_of_another(start: Callable[..., Engine]) -> None:
    engine = start("--no-hook", "--base-ms", "1", "--prefill-us", "100")
    async with await MockEngineClient.connect(engine.rank_ports) as client:
        client.send(1, "decoding", 1, 10_000)
        await collect(client, lambda said: True)
        client.send(0, "long", 4_000, 1)
        said = await collect(client, lambda said: "long" in finished(said) and said[-1][0] == 1)
    instants = sorted(event.t for rank, event in said if rank == 1)
    assert max(later - earlier for earlier, later in pairwise(instants)) >= 0.4


async def test_an_abort_and_a_closed_connection_take_requests_back(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    stats = tmp_path / "steps.jsonl"
    engine = start(*FAST, "--stats", str(stats))
    async with await MockEngineClient.connect(engine.rank_ports) as staying:
        staying.send(2, "short", 10, 300)
        async with await MockEngineClient.connect(engine.rank_ports) as leaving:
            leaving.send(2, "left alone", 100, 100_000)
            leaving.send(2, "taken back", 100, 100_000)
            await collect(leaving, lambda said: any(len(event.tokens) == 2 for _, event in said))
            leaving.abort(2, "taken back")
            said = await collect(leaving, lambda said: any(event.aborted for _, event in said))
            assert said[-1][1].aborted == ["taken back"]
        await collect(staying, lambda said: "short" in finished(said))
    last = json.loads(stats.read_text().splitlines()[-1])
    assert last["requests"] == [0] * RANKS, "the closed connection's request is gone as well"


async def test_a_bad_message_is_answered_and_the_connection_goes_on(start: Callable[..., Engine]) -> None:
    engine = start(*FAST, "--kv-capacity", "1000")
    async with await MockEngineClient.connect(engine.rank_ports) as client:
        client.send(1, "nothing to do", 0, 5)
        client.send(1, "too long", 1_000, 1)
        client.send(1, "good", 10, 1)
        said = await collect(client, lambda said: "good" in finished(said))
    assert [(event.request_id, bool(event.error)) for _, event in said] == [
        ("nothing to do", True),
        ("too long", True),
        (None, False),
    ]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_told_engine_ends_cleanly(start: Callable[..., Engine], how: signal.Signals) -> None:
    engine = start(*FAST)
    engine.process.send_signal(how)
    assert engine.process.wait(10) == 0
    assert not any(map(alive, engine.pids))


def test_an_interrupt_of_the_whole_group_ends_it_cleanly_too(start: Callable[..., Engine]) -> None:
    engine = start(*FAST)
    for pid in (engine.process.pid, *engine.pids):  # what Ctrl-C in a terminal does
        os.kill(pid, signal.SIGINT)
    assert engine.process.wait(10) == 0


async def test_a_dead_rank_ends_the_engine(start: Callable[..., Engine]) -> None:
    engine = start(*FAST)
    async with await MockEngineClient.connect(engine.rank_ports) as client:
        client.send(0, "unlucky", 10, 100_000)
        await collect(client, lambda said: True)
        os.kill(engine.pids[2], signal.SIGKILL)
        with pytest.raises(AssertionError, match="hung up"):
            await collect(client, lambda said: False)
    assert engine.process.wait(10) == 1
    assert not any(map(alive, engine.pids))


def test_ranks_do_not_survive_their_engine(start: Callable[..., Engine], eventually: Eventually) -> None:
    engine = start(*FAST)
    engine.process.kill()
    eventually(lambda: not any(map(alive, engine.pids)), "all ranks have ended")


def test_an_engine_does_not_survive_its_parent(eventually: Eventually) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({[*COMMAND, *FAST]!r})"], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout
        pids = json.loads(parent.stdout.readline())["pids"]
        parent.kill()
    eventually(lambda: not any(map(alive, pids)), "all ranks have ended")


def test_a_wrong_command_line_and_a_taken_port_are_told_apart(start: Callable[..., Engine]) -> None:
    taken = start(*FAST).rank_ports[0]
    wrong = subprocess.run([*COMMAND, "--speed", "0"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--speed: must be more than 0" in wrong.stderr
    refused = subprocess.run([*COMMAND, *FAST, "--port", str(taken)], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("mock engine: ")


@pytest.mark.parametrize("form", ["gather", "leader"])
async def test_the_pool_follows_the_engine_and_forgets_it_when_it_ends(
    start: Callable[..., Engine], settings: Settings, eventually: Eventually, form: str
) -> None:
    engine = start("--redis", str(settings.url), "--pool", settings.pool, "--form", form, *FAST[1:])
    with Dispatcher(settings) as dispatcher:
        eventually(lambda: len(dispatcher.snapshot().ranks) == RANKS, "all ranks have joined")
        async with await MockEngineClient.connect(engine.rank_ports) as client:
            for number in range(20):
                placement = dispatcher.dispatch(f"r{number}", 50)
                client.send(placement.index, f"r{number}", 50, 100_000)
            await collect(client, lambda said: len({name for _, event in said for name, _ in event.tokens}) == 20)

            def totals() -> tuple[int, int, int]:
                pool = dispatcher.snapshot()
                return (
                    pool.bookings,
                    sum(rank.in_flight_tokens for rank in pool.ranks),
                    sum(r.requests for r in pool.ranks),
                )

            eventually(lambda: totals() == (0, 0, 20), "every request has been received and is held")
            assert sum(rank.holding_tokens for rank in dispatcher.snapshot().ranks) > 20 * 50
        eventually(lambda: totals() == (0, 0, 0), "the closed connections' requests are gone")
        engine.process.terminate()
        assert engine.process.wait(10) == 0
        assert dispatcher.snapshot().ranks == ()


def test_a_hook_without_a_redis_is_refused_before_anything_starts() -> None:
    without = {name: value for name, value in os.environ.items() if name != "DP_BALANCER_URL"}
    refused = subprocess.run(COMMAND, capture_output=True, text=True, env=without)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no Redis address" in refused.stderr
