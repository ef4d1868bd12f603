"""The gather under DP attention: entered by all processes of the TP group or by none, over one node or two."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from balancer import Dispatcher, Request, Settings
from balancer.embedded import EmbeddedRedis

pytest.importorskip("torch")

Eventually = Callable[..., None]
PROGRAM = Path(__file__).with_name("sglang_processes.py")
TOKENS = 7
END_S = 60.0


class Processes:
    """Schedulers at their loop, until `end`."""

    def __init__(self, started: list[subprocess.Popen[str]], end: Path) -> None:
        self._started, self._end = started, end

    def end(self) -> list[dict[str, Any]]:
        """Let them end; what each has to say, in order."""
        self._end.touch()
        said: list[dict[str, Any]] = []
        for process in self._started:
            out, _ = process.communicate(timeout=END_S)
            assert process.returncode == 0, "a process has failed or was hung up"
            said += [json.loads(line) for line in out.splitlines()]
        return sorted(said, key=lambda line: line["number"])


@contextmanager
def schedulers(
    url: str,
    tmp_path: Path,
    requests: dict[int, list[str]],
    *,
    world: int = 4,
    attn_tp: int = 1,
    at_once: int = 1_000,
    without: Sequence[int] = (),
    other: Sequence[int] = (),
    clumsy: Sequence[int] = (),
    begin: Path | None = None,
    meeting: str = "",
    interface: str = "lo",
    nodes: Sequence[Sequence[str]] = ((),),
) -> Iterator[Processes]:
    """`world` processes; `nodes`: for each node the words before its command, and an equal share of the processes."""
    end = tmp_path / "end"
    plan = {
        "url": url,
        "meeting": meeting or f"file://{tmp_path / 'meeting'}",
        "world": world,
        "attn_tp": attn_tp,
        "at_once": at_once,
        "without": without,
        "other": other,
        "clumsy": clumsy,
        "requests": requests,
        "begin": str(begin or ""),
        "end": str(end),
        "interface": interface,
    }
    share = world // len(nodes)
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    started = []
    for node, before in enumerate(nodes):
        mine = json.dumps(plan | {"mine": list(range(node * share, (node + 1) * share))})
        command = [*before, sys.executable, str(PROGRAM), mine]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        yield Processes(started, end)
    finally:
        end.touch()
        for process in started:
            try:
                process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def booked(dispatcher: Dispatcher, names: list[str]) -> list[str]:
    dispatcher.dispatch_many([Request(name, TOKENS) for name in names])
    return names


def shows(dispatcher: Dispatcher, held: Sequence[int]) -> bool:
    """Whether the ranks hold so many requests, their tokens, and nothing is in flight."""
    try:
        snapshot = dispatcher.snapshot()
    except Exception:
        return False
    tokens = [rank.holding_tokens for rank in snapshot.ranks]
    return tokens == [TOKENS * count for count in held] and not any(rank.in_flight_tokens for rank in snapshot.ranks)


def test_four_ranks_are_reported_by_the_first_one(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually, tmp_path: Path
) -> None:
    requests = {0: ["a"], 1: [], 2: ["b", "c"], 3: ["d"]}
    with schedulers(str(settings.url), tmp_path, requests) as processes:
        eventually(lambda: shows(dispatcher, [1, 0, 2, 1]), "all ranks' counts are there", within_s=60)
        assert [engine.name for engine in dispatcher.snapshot().engines] == ["e"]
        said = processes.end()
    assert [line["gathers"] for line in said] == [True] * 4
    assert not any(line["troubles"] for line in said)


def test_with_two_processes_to_a_rank_its_leader_counts(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually, tmp_path: Path
) -> None:
    """The seed made a list of as many rows as DP ranks, where the group has more processes: torch refuses that."""
    requests = {0: ["a", "b"], 1: ["c"]}
    with schedulers(str(settings.url), tmp_path, requests, attn_tp=2) as processes:
        eventually(lambda: shows(dispatcher, [2, 1]), "two ranks of two processes", within_s=60)
        assert all(line["gathers"] for line in processes.end())


def test_more_ids_than_a_row_has_room_for_end_over_several_steps(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually, tmp_path: Path
) -> None:
    """The seed's row had room for 510 ids and asserted that there were no more."""
    names, begin = [f"r{number}" for number in range(700)], tmp_path / "begin"
    with schedulers(str(settings.url), tmp_path, {0: names, 1: []}, world=2, begin=begin) as processes:
        eventually(lambda: shows(dispatcher, [0, 0]), "they have joined", within_s=60)
        booked(dispatcher, names)
        assert dispatcher.snapshot().bookings == 700
        begin.touch()
        eventually(lambda: shows(dispatcher, [700, 0]), "all are counted and none is in flight", within_s=30)
        assert (dispatcher.snapshot().bookings, dispatcher.snapshot().expired) == (0, 0)
        assert all(line["gathers"] for line in processes.end())


@pytest.mark.parametrize(
    "difference",
    [{"without": [3]}, {"other": [3]}, {"clumsy": [3]}, {"clumsy": [0]}],
    ids=["no plugin", "other settings", "cannot build its side", "the first cannot"],
)
def test_where_one_process_would_stay_away_nobody_gathers_and_nobody_hangs(
    settings: Settings, dispatcher: Dispatcher, eventually: Eventually, tmp_path: Path, difference: dict[str, Any]
) -> None:
    requests = {0: ["a"], 1: ["b"], 2: ["c"], 3: ["d"]}
    with schedulers(str(settings.url), tmp_path, requests, **difference) as processes:
        there = 3 if "without" in difference else 4
        eventually(lambda: shows(dispatcher, [1] * there), "each leader reports alone", within_s=60)
        said = processes.end()
    assert [line["gathers"] for line in said] == [False] * 4
    assert [line["hook"] for line in said] == [True] * 3 + [there == 4]


# -- two nodes: two network namespaces, joined by a pair of virtual cables


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other at 10.77.0.1 and .2, and their names."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    names = (f"dpb{os.getpid()}a", f"dpb{os.getpid()}b")
    try:
        for name in names:
            run("ip", "netns", "add", name)
    except subprocess.CalledProcessError:
        pytest.skip("this machine makes no network namespaces")
    try:
        cables = (f"v{os.getpid()}a", f"v{os.getpid()}b")
        run("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            run("ip", "link", "set", cable, "netns", name, "name", "eth0")
            run("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            run("ip", "netns", "delete", name)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def test_a_gather_over_two_nodes_is_reported_by_the_first(
    two_nodes: tuple[str, str], eventually: Eventually, tmp_path: Path
) -> None:
    """The nodes share no loopback. Redis is reached by a socket in the file system, which all namespaces share."""
    with EmbeddedRedis() as server, reachable_by_file(server, tmp_path) as url:
        dispatcher = Dispatcher(Settings(url=url, pool="p", budget_ms=2_000))
        requests = {0: ["a"], 1: ["b", "c"], 2: [], 3: ["d"]}
        nodes = [("ip", "netns", "exec", name) for name in two_nodes]
        meeting = "tcp://10.77.0.1:29555"
        with schedulers(url, tmp_path, requests, nodes=nodes, meeting=meeting, interface="eth0") as processes:
            eventually(lambda: shows(dispatcher, [1, 2, 0, 1]), "both nodes' ranks are there", within_s=60)
            assert [engine.name for engine in dispatcher.snapshot().engines] == ["e"]
            assert all(line["gathers"] for line in processes.end())
        dispatcher.close()


@contextmanager
def reachable_by_file(server: EmbeddedRedis, tmp_path: Path) -> Iterator[str]:
    """A unix socket that leads to the server's port."""
    import threading

    path = tmp_path / "redis.sock"
    port = int(str(server.url).rsplit(":", 1)[1].split("/")[0])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                target.sendall(data)
        except OSError:
            pass
        target.close()

    def accept() -> None:
        try:
            while True:
                one, _ = listener.accept()
                other = socket.create_connection(("127.0.0.1", port))
                for pair in ((one, other), (other, one)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()
        except OSError:
            pass

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"unix://{path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
