"""What a dispatch within 5 ms gets from Redis beside the reports of large servers, with and without publishers' rests.

    python -m tests.bench.sglang_reports --servers 4 --step-ms 30 [--apart] [--no-rest | --every 4 | --gather]

Publishers are raw sockets of one process, each with one report under way: news at the end of each of its engine's
steps, then the publisher's own rest, and what comes meanwhile goes with the next report. The ranks of a server step
together, as with DP attention, or each by itself (`--apart`, as with plain --dp). The dispatcher has the plugin's
settings.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import math
import multiprocessing
import random
import select
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

from hiredis import pack_command

from balancer import BalancerError, Dispatcher, Outcome, PoolAdmin, RankCounts, Reporter, Settings, protocol
from balancer.embedded import EmbeddedRedis
from balancer.model import Report
from balancer.store import _by_sha
from scheduler_hooks.publisher import HEARTBEAT_S, _rest_s
from scheduler_hooks.sglang.dispatching import BUDGET_MS, OPENS_AFTER

RANKS = 64
DISPATCHES = 150
PAUSE_S = 0.02
SETTLE_S = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--step-ms", type=float, default=30)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--apart", action="store_true", help="ranks step each by itself")
    parser.add_argument("--no-rest", action="store_true")
    parser.add_argument("--gather", action="store_true", help="one report per server")
    options = parser.parse_args()
    with EmbeddedRedis() as server:
        settings = Settings(url=server.url, pool="reports", budget_ms=3_000)
        PoolAdmin(settings).configure(engine_lease_ms=600_000)
        commands = joined(settings, options.servers, options.gather)
        queue: Any = multiprocessing.Queue()
        ended = multiprocessing.Event()
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        publishers = multiprocessing.Process(target=publish, args=(port, commands, options, ended, queue))
        publishers.start()
        time.sleep(SETTLE_S)
        placed, took_ms = dispatched(
            Settings(url=server.url, pool="reports", budget_ms=BUDGET_MS, tries=1, opens_after=OPENS_AFTER)
        )
        ended.set()
        rate, reports_ms = queue.get()
        publishers.join()
    print(f"placed {placed} of {DISPATCHES}, each within {centiles(took_ms)}")
    print(f"{rate:,.0f} reports/s, each within {centiles(reports_ms)}")


def joined(settings: Settings, servers: int, gather: bool) -> list[tuple[int, bytes]]:
    """Each publisher's server and its report as it goes over the wire."""
    commands = []
    for number in range(servers if gather else servers * RANKS):
        at, size, index = (number, RANKS, None) if gather else (number // RANKS, 1, number % RANKS)
        reporter = Reporter(settings, f"e{at}", size, index)
        counts = [RankCounts(1_000 + number, 5)] * size
        reporter.join()
        reporter.report(1, counts)
        operation = protocol.report(settings.pool, reporter.incarnation, Report(1, counts, []))
        commands.append((at, pack_command(_by_sha(operation))))
        reporter.close()
    return commands


def publish(port: int, commands: Sequence[tuple[int, bytes]], options: Any, ended: Any, queue: Any) -> None:
    """Report until `ended`; puts reports per second and how long each took (ms)."""
    period_s = options.every * options.step_ms / 1_000
    start_s = time.monotonic() + 0.3
    phases_s = [random.random() * period_s for _ in range(options.servers)]
    poll = select.epoll()
    sockets, commands_of, first_s, sent_s = {}, {}, {}, {}
    for at, command in commands:
        made = socket.create_connection(("127.0.0.1", port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[made.fileno()], commands_of[made.fileno()] = made, command
        first_s[made.fileno()] = start_s + (random.random() * period_s if options.apart else phases_s[at])
        poll.register(made, select.EPOLLIN)
    due = [(when, fd) for fd, when in first_s.items()]
    heapq.heapify(due)
    took_ms = []
    while not ended.is_set():
        while due and due[0][0] <= time.monotonic():
            _, fd = heapq.heappop(due)
            sent_s[fd] = time.monotonic()
            sockets[fd].sendall(commands_of[fd])
        for fd, _ in poll.poll(max(0.0, due[0][0] - time.monotonic()) if due else 1):
            sockets[fd].recv(4_096)
            now = time.monotonic()
            took_s = now - sent_s[fd]
            took_ms.append(1_000 * took_s)
            rested_s = now + (0 if options.no_rest else _rest_s(took_s, HEARTBEAT_S))
            steps = math.floor((sent_s[fd] - first_s[fd]) / period_s) + 1
            heapq.heappush(due, (max(rested_s, first_s[fd] + steps * period_s), fd))
    queue.put((len(took_ms) / (time.monotonic() - start_s), took_ms))


def dispatched(settings: Settings) -> tuple[int, list[float]]:
    """How many of DISPATCHES among one server's ranks the pool placed, and how long each took (ms)."""
    placed, took_ms = 0, []
    among = [f"e0/{index}" for index in range(RANKS)]
    with Dispatcher(settings) as dispatcher:
        for number in range(DISPATCHES):
            began_s = time.perf_counter()
            with contextlib.suppress(BalancerError):
                placed += dispatcher.dispatch(f"r{number}", 300, among).outcome is Outcome.PLACED
            took_ms.append(1_000 * (time.perf_counter() - began_s))
            time.sleep(PAUSE_S)
    return placed, took_ms


def centiles(values: Sequence[float]) -> str:
    """`1.2 ms p50, 3.4 p99`."""
    cuts = statistics.quantiles(values, n=100)
    return f"{cuts[49]:.1f} ms p50, {cuts[98]:.1f} p99"


if __name__ == "__main__":
    main()
