"""The cast of the tests with many processes: dispatchers and mock engines, real ones, that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_DISPATCHER = """
import json, sys
from balancer import Dispatcher, NoRank, Request
url, pool, name = sys.argv[1:4]
dispatcher = Dispatcher.connect(url, pool, name=name, budget_ms=int(sys.argv[4]))
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    placed = []
    for request_id, tokens in order:
        try:
            answer = dispatcher.dispatch(request_id, tokens)
            placed.append([request_id, answer.rank, answer.outcome])
        except NoRank as none:
            placed.append([request_id, None, none.reason])
    print(json.dumps(placed), flush=True)
"""


class DispatcherProcess:
    """A dispatcher in a process of its own: dispatches what it is told, one request after the other."""

    def __init__(self, url: str, pool: str, name: str, budget_ms: int = 2_000) -> None:
        command = [sys.executable, "-c", _DISPATCHER, url, pool, name, str(budget_ms)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        """Wait until it has imported all it needs."""
        assert self._line() == "ready"

    def order(self, requests: list[tuple[str, int]]) -> None:
        """Dispatch these; does not wait."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()

    def answers(self) -> list[tuple[str, str | None, str]]:
        """For each request of an order: its id, its rank or None, and outcome or reason."""
        return [tuple(answer) for answer in self._line()]

    def _line(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the dispatcher has ended"
        return json.loads(line)

    def kill(self) -> None:
        """kill -9, as a machine does that goes away."""
        self.process.kill()
        self.end()

    def end(self) -> None:
        """End it and close its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def dispatchers(count: int, url: str, pool: str, budget_ms: int = 2_000) -> Iterator[list[DispatcherProcess]]:
    """`count` dispatchers, ready."""
    started = [DispatcherProcess(url, pool, f"dispatcher-{index}", budget_ms) for index in range(count)]
    try:
        for dispatcher in started:
            dispatcher.wait_ready()
        yield started
    finally:
        for dispatcher in started:
            dispatcher.end()


class MockEngineProcess:
    """A mock engine with the real hook; `kill` takes all its ranks at once."""

    def __init__(self, url: str, pool: str, *options: str, name: str = "mock-0", ranks: int = 4) -> None:
        command = [sys.executable, "-m", "scheduler_hooks.mock_engine", "--engine", name, "--pool", pool]
        command += ["--redis", url, "--ranks", str(ranks), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the mock engine did not start"
        ready = json.loads(line)
        self.rank_ports: list[int] = ready["rank_ports"]
        self.pids: list[int] = ready["pids"]

    def kill(self) -> None:
        """kill -9 of every process of it."""
        for pid in (self.process.pid, *self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> MockEngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()
        assert self.process.stdout
        self.process.stdout.close()
