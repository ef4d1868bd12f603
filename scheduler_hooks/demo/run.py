"""The main job: one mock engine, several dispatcher replicas, the same requests once per policy, one table.

Everything is a process of its own, as in production; this room starts them, shows how far they are, and leaves nothing
behind. A given Redis serves in a pool of the demo's own, removed at the end; with none given, a server of our own.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import orjson

from balancer import BalancerError, InvalidInput, PoolAdmin, Settings
from balancer.embedded import EmbeddedRedis
from balancer.settings import redacted
from balancer.workload import TimedRequest, generate, load_trace, scaled
from scheduler_hooks.demo.measure import Times, figures
from scheduler_hooks.demo.replica import Orders
from scheduler_hooks.demo.table import render

POLICIES = ("round_robin", "minimum_tokens")
DOCUMENT_SHARE = 0.1
"""One prompt in ten carries a document, the others are chat: uneven, as traffic is."""

QUICK_OUTPUT = 40

_LEAD_S = 1.0
"""How long replicas have to connect before the first request arrives."""

_DESCRIPTION = """\
Places one stream of requests on a mock engine of real rank processes, once per policy, through several dispatcher
processes that share one Redis, and shows how long the requests took. The engine computes nothing: a step sleeps as
long as its slowest rank would take. Redis: --url, else DP_BALANCER_URL, else one started for the time of the demo.
"""

_EXAMPLES = """\
examples:
  balancer demo                                      100 prompts at once, three times over; about 75 s
  balancer demo --rounds 1 --requests 400 --rate 14  a steady stream
  balancer demo --rounds 1 --requests 300 --rate 8 --trace conversation.jsonl.gz
                                                     lengths and arrival pattern of a real trace
"""


def parser() -> argparse.ArgumentParser:
    """The demo's arguments."""
    made = argparse.ArgumentParser(
        prog="balancer demo",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--url", metavar="URL", help="a Redis to use, in a pool of the demo's own")
    add("--ranks", type=int, default=16, metavar="N", help="ranks of the engine (default 16)")
    add("--dispatchers", type=int, default=3, metavar="N", help="dispatcher processes (default 3)")
    add("--requests", type=int, metavar="N", default=100, help="requests of a round (default 100)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds, each with a seed of its own (default 3)")
    add(
        "--rate",
        type=float,
        metavar="R",
        help="mean arrivals per second, inf for all at once (default inf, or the trace's own)",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the first round (default 1)")
    add("--trace", metavar="FILE", help="CSV (arrival_s,input_len,output_len) or JSONL (timestamp,input_length,"
        "output_length), plain or gzip, instead of the built-in lengths")  # fmt: skip
    add("--max-input", type=int, metavar="N", help="cut prompts to N tokens")
    add("--max-output", type=int, metavar="N", help="cut answers to N tokens (default 400)", default=400)
    add("--policy", action="append", metavar="NAME", help="policy to run, may be repeated (default: round_robin and "
        "minimum_tokens)")  # fmt: skip
    add("--form", choices=("gather", "leader"), default="gather", help="how the engine reports (default gather)")
    add("--json", metavar="FILE", help="also write the figures as JSON")
    add("--quick", action="store_true", help="a short run: shows that it works, not what it is worth")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the process's exit code."""
    streams = _streams(arguments)
    policies = tuple(arguments.policy or POLICIES)
    with contextlib.ExitStack() as stack:
        url = Settings.from_environment(url=arguments.url).url
        if url is None:
            embedded = stack.enter_context(EmbeddedRedis())
            url = embedded.url
            print(f"Redis      {url} (started for this demo; look inside: redis-cli -u {url})")
        else:
            print(f"Redis      {redacted(url)}")
        pool = f"demo-{secrets.token_hex(3)}"
        admin = PoolAdmin(Settings.from_environment(url=url, pool=pool, budget_ms=2_000))
        stack.callback(admin.close)
        stack.callback(_removed, admin)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dp-balancer-demo-")))
        engine = stack.enter_context(_Engine(arguments, url, pool, directory / "steps.jsonl"))
        print(f"engine     {engine.name}, {arguments.ranks} rank processes, pool {pool} ({arguments.form} form)")
        tokens = sum(request.input_tokens for requests in streams for request in requests)
        count, rounds = len(streams[0]), len(streams)
        print(f"requests   {rounds} x {count}, {tokens:,} prompt tokens, {arguments.dispatchers} dispatchers\n")
        seen: dict[str, list[Times]] = {policy: [] for policy in policies}
        steps: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
        for number, requests in enumerate(streams):
            for policy in policies:
                admin.configure(policy=policy)
                times = _stream(policy, number, requests, arguments.dispatchers, url, pool, engine)
                seen[policy].append(times)
                steps[policy] += engine.steps(times.first_s, times.last_s)
                if left := admin.snapshot().bookings:
                    print(f"demo: {left} bookings were left after {policy}", file=sys.stderr)
                    return 1
        results = {policy: figures(seen[policy], steps[policy]) for policy in policies}
        print(render(results))
    if arguments.json:
        Path(arguments.json).write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    return 0


def _streams(arguments: argparse.Namespace) -> list[list[TimedRequest]]:
    """The stream of each round."""
    if arguments.rate is not None and not arguments.rate > 0:
        raise InvalidInput("--rate must be more than 0, or inf")
    for name in ("ranks", "dispatchers", "rounds", "requests"):
        if getattr(arguments, name) < 1:
            raise InvalidInput(f"--{name} must be at least 1")
    rounds = 1 if arguments.quick else arguments.rounds
    return [_requests(arguments, arguments.seed + number) for number in range(rounds)]


def _requests(arguments: argparse.Namespace, seed: int) -> list[TimedRequest]:
    count, rate = arguments.requests, arguments.rate
    if arguments.trace is None:
        requests = generate(count, seed, rate or math.inf, document_share=DOCUMENT_SHARE)
        rate = None
    else:
        requests = load_trace(arguments.trace, rate_per_s=rate or math.inf, seed=seed)
    return scaled(
        requests,
        count=count,
        rate_per_s=rate,
        max_input_tokens=arguments.max_input,
        max_output_tokens=QUICK_OUTPUT if arguments.quick else arguments.max_output,
    )


class _Engine:
    """The mock engine's process."""

    name = "mock-0"

    def __init__(self, arguments: argparse.Namespace, url: str, pool: str, stats: Path) -> None:
        self._stats = stats
        command = [sys.executable, "-m", "scheduler_hooks.mock_engine", "--engine", self.name, "--pool", pool]
        command += ["--redis", url, "--ranks", str(arguments.ranks), "--form", arguments.form, "--stats", str(stats)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
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


def _stream(
    policy: str,
    number: int,
    requests: Sequence[TimedRequest],
    dispatchers: int,
    url: str,
    pool: str,
    engine: _Engine,
) -> Times:
    """Send all requests through the replicas, each taking every n-th, and wait for the last token."""
    plans: list[list[tuple[float, str, int, int]]] = [[] for _ in range(dispatchers)]
    for index, request in enumerate(requests):
        name = f"{policy}-{number}-{index}"
        plans[index % dispatchers].append((request.arrival_s, name, request.input_tokens, request.output_tokens))
    progress = _Progress(f"{policy} {number + 1}", len(requests), dispatchers)
    times = Times()
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_Replica()) for _ in plans]
        for replica in started:
            replica.wait_ready()
        start_s = time.monotonic() + _LEAD_S
        readers = []
        for index, (replica, plan) in enumerate(zip(started, plans, strict=True)):
            replica.order(Orders(url, pool, f"replica-{index}", engine.rank_ports, start_s, plan))
            readers.append(threading.Thread(target=replica.read, args=(index, progress)))
            readers[-1].start()
        for reader in readers:
            reader.join()
        progress.end()
        for replica in started:
            times.add(replica.result())
    return times


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
                self._times = Times(**message["times"])

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
