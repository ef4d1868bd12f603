"""What demos play on: a Redis, a pool of its own, one mock engine, and dispatcher processes made anew for each stream.

Everything is a process of its own, as in production. The stage starts them, shows how far they are, and leaves nothing
behind: a given Redis loses the pool at the end; where none is given, a server of our own ends with it.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from balancer import BalancerError, PoolAdmin, Settings
from balancer.embedded import EmbeddedRedis
from balancer.settings import redacted
from balancer.workload import TimedRequest
from scheduler_hooks.demo.measure import Times
from scheduler_hooks.demo.replica import Orders

_LEAD_S = 1.0
"""How long replicas have to connect before the first request arrives."""


@dataclass(frozen=True, slots=True)
class Played:
    """What was seen of one stream: the requests' times, and the engine's step records (`mock_engine.step_log`)
    from the first arrival, at `start_s` of the host's monotonic clock, to the last token."""

    start_s: float
    times: Times
    steps: list[dict[str, Any]]


class Stage:
    """Engine and pool for the time of a `with`. `what` names the caller where people see it, in the pool's name too.

    `url` None: DP_BALANCER_URL, else a server of our own. `speed`: how many times as fast as its steps last the engine
    runs. `form`: how it reports, "gather" or "leader". Raises BalancerError where a part does not start.
    """

    def __init__(
        self, what: str, *, ranks: int, dispatchers: int, url: str | None, form: str, speed: float = 1.0
    ) -> None:
        self.what, self.ranks, self.form = what, ranks, form
        self._dispatchers, self._url, self._speed = dispatchers, url, speed
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            self._url = url = Settings.from_environment(url=self._url).url
            if url is None:
                self._url = url = stack.enter_context(EmbeddedRedis()).url
                print(f"Redis      {url} (started for this {self.what}; look inside: redis-cli -u {url})")
            else:
                print(f"Redis      {redacted(url)}")
            self.pool = f"{self.what}-{secrets.token_hex(3)}"
            self._admin = PoolAdmin(Settings.from_environment(url=url, pool=self.pool, budget_ms=2_000))
            stack.callback(self._admin.close)
            stack.callback(_removed, self._admin)
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="dp-balancer-"))
            self._engine = stack.enter_context(_Engine(self, url, self._speed, Path(directory) / "steps.jsonl"))
            print(f"engine     {self._engine.name}, {self.ranks} rank processes, pool {self.pool} ({self.form} form)")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def play(self, policy: str, number: int, requests: Sequence[TimedRequest]) -> Played:
        """Send all requests under a policy, each replica taking every n-th, and wait for the last token.

        `number` is the round's, for request ids: `POLICY-NUMBER-INDEX`. Raises BalancerError where a replica fails or
        bookings are left over.
        """
        assert self._url is not None
        self._admin.configure(policy=policy)
        plans: list[list[tuple[float, str, int, int]]] = [[] for _ in range(self._dispatchers)]
        for index, request in enumerate(requests):
            name = f"{policy}-{number}-{index}"
            plan = plans[index % self._dispatchers]
            plan.append((request.arrival_s, name, request.input_tokens, request.output_tokens))
        progress = _Progress(f"{policy} {number + 1}", len(requests), self._dispatchers)
        times = Times()
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(_Replica()) for _ in plans]
            for replica in started:
                replica.wait_ready()
            start_s = time.monotonic() + _LEAD_S
            readers = []
            for index, (replica, plan) in enumerate(zip(started, plans, strict=True)):
                replica.order(Orders(self._url, self.pool, f"replica-{index}", self._engine.rank_ports, start_s, plan))
                readers.append(threading.Thread(target=replica.read, args=(index, progress)))
                readers[-1].start()
            for reader in readers:
                reader.join()
            progress.end()
            for replica in started:
                times.add(replica.result())
        if left := self._admin.snapshot().bookings:
            raise BalancerError(f"{left} bookings were left after {policy}")
        return Played(start_s, times, list(self._engine.steps(times.first_s, times.last_s)))


class _Engine:
    """The mock engine's process."""

    name = "mock-0"

    def __init__(self, stage: Stage, url: str, speed: float, stats: Path) -> None:
        self._stats = stats
        command = [sys.executable, "-m", "scheduler_hooks.mock_engine", "--engine", self.name, "--pool", stage.pool]
        command += ["--redis", url, "--ranks", str(stage.ranks), "--form", stage.form, "--stats", str(stats)]
        self._process = subprocess.Popen([*command, "--speed", str(speed)], stdout=subprocess.PIPE)
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise BalancerError(f"the mock engine did not start (exit code {self._process.wait()})")
        self.rank_ports: list[int] = orjson.loads(line)["rank_ports"]

    def steps(self, first_s: float, last_s: float) -> Iterator[dict[str, Any]]:
        """The records of the steps between two moments of the monotonic clock."""
        for line in self._stats.read_bytes().splitlines():
            record = orjson.loads(line)
            if first_s <= record["t"] <= last_s:
                yield record

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()
        _pipe(self._process.stdout).close()


class _Replica:
    """A dispatcher's process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scheduler_hooks.demo.replica"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._times: Times | None = None

    def wait_ready(self) -> None:
        """Wait until it has imported all it needs."""
        _pipe(self._process.stdout).readline()

    def order(self, orders: Orders) -> None:
        """Tell it what to do."""
        _pipe(self._process.stdin).write(orjson.dumps(asdict(orders), option=orjson.OPT_APPEND_NEWLINE))
        _pipe(self._process.stdin).flush()

    def read(self, index: int, progress: _Progress) -> None:
        """Follow what it says until it ends."""
        for line in _pipe(self._process.stdout):
            message = orjson.loads(line)
            if "finished" in message:
                progress.show(index, message["finished"])
            else:
                self._times = Times.of(message["times"])

    def result(self) -> Times:
        """What it saw; raises BalancerError where it failed (it has said why on stderr)."""
        if self._times is None:
            raise BalancerError("a dispatcher replica failed")
        return self._times

    def __enter__(self) -> _Replica:
        return self

    def __exit__(self, *exc: object) -> None:
        _pipe(self._process.stdin).close()
        self._process.terminate()
        self._process.wait()
        _pipe(self._process.stdout).close()


class _Progress:
    """A bar on a terminal, else a line per quarter."""

    _WIDTH = 40

    def __init__(self, policy: str, total: int, replicas: int) -> None:
        self._policy, self._total = policy, total
        self._finished = [0] * replicas
        self._lock = threading.Lock()
        self._quarter = 0
        self._terminal = sys.stdout.isatty()

    def show(self, replica: int, finished: int) -> None:
        """A replica has finished so many."""
        with self._lock:
            self._finished[replica] = finished
            done = sum(self._finished)
            if self._terminal:
                filled = self._WIDTH * done // self._total
                bar = "#" * filled + "." * (self._WIDTH - filled)
                print(f"\r{self._policy:17} [{bar}] {done}/{self._total}", end="", flush=True)
            elif 4 * done // self._total > self._quarter:
                self._quarter = 4 * done // self._total
                print(f"{self._policy:17} {done}/{self._total}", flush=True)

    def end(self) -> None:
        """Close the line."""
        if self._terminal:
            print("\r" + " " * (self._WIDTH + 40) + "\r", end="", flush=True)


def _removed(admin: PoolAdmin) -> None:
    with contextlib.suppress(BalancerError):  # an own server that has gone takes the pool with it
        admin.remove()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
