"""`balancer serve` as a program: what it starts by itself, several workers on one port, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balancer.embedded import EmbeddedRedis

Eventually = Callable[..., None]
_CONNECTIONS = "balancer_client_connections{"


@contextlib.contextmanager
def program(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """`balancer serve` with these words; its process, port and first lines."""
    command = [sys.executable, "-m", "balancer.cli", "serve", "--port", "0", "--budget-ms", "2000"]
    command += ["--drain-seconds", "0", *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DP_BALANCER_URL")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**clean, **environment}
    )
    try:
        assert process.stdout
        lines = ""
        while "serving" not in lines:
            line = process.stdout.readline()
            assert line, f"it did not start: {lines}"
            lines += line
        found = re.search(r"serving +https?://[^:]+:(\d+)", lines)
        assert found
        yield process, int(found[1]), lines
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout
        process.stdout.close()


def get(port: int, path: str, fields: Any = None) -> bytes:
    data = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return bytes(answer.read())


def answers(port: int, path: str = "/readyz") -> bool:
    try:
        return bool(get(port, path))
    except (OSError, urllib.error.URLError):
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_with_nothing_given_it_starts_what_it_needs_and_answers(eventually: Eventually) -> None:
    with program() as (process, port, lines):
        assert "Redis" in lines
        assert "a mock with 4 ranks" in lines
        eventually(lambda: answers(port), "it is ready", within_s=30)
        chat = json.loads(get(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}))
        assert chat["choices"][0]["message"]["content"].startswith("every rank")
        stray = children(process.pid)
        assert stray
        process.terminate()
        assert process.wait(20) == 0
        eventually(lambda: not any(map(is_alive, stray)), "what it started has ended")


def test_workers_share_a_port_and_their_metrics_and_a_dead_one_is_replaced(
    redis_server: EmbeddedRedis, client: object, eventually: Eventually
) -> None:
    environment = {"DP_BALANCER_URL": redis_server.url, "DP_BALANCER_POOL": "p"}
    with program("--workers", "2", **environment) as (process, port, _):
        eventually(lambda: answers(port), "it is ready", within_s=30)
        mock = {pid for pid in children(process.pid) if "mock_process" in Path(f"/proc/{pid}/cmdline").read_text()}
        workers = set(children(process.pid)) - mock
        assert len(workers) == 2
        for _ in range(30):
            get(port, "/v1/completions", {"prompt": "hi", "max_tokens": 1})

        def counted() -> float:
            text = get(port, "/metrics").decode()
            placed = [line for line in text.splitlines() if line.startswith("balancer_decisions_total{")]
            return sum(float(line.split()[-1]) for line in placed)

        eventually(lambda: {counted() for _ in range(6)} == {30.0}, "whichever worker is asked answers for all")

        def connections() -> float:
            text = get(port, "/metrics").decode()
            return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(_CONNECTIONS))

        with contextlib.ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            eventually(lambda: min(connections() for _ in range(6)) > 16, "each answers for all", within_s=20)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: len(set(children(process.pid)) - mock - workers) == 2, "new workers", within_s=20)
            eventually(lambda: answers(port), "one answers", within_s=30)
            eventually(lambda: connections() < 8, "what the dead ones held is held no more", within_s=20)
        eventually(lambda: answers(port), "it answers", within_s=30)
        process.kill()
        left = set(children(process.pid)) | workers | mock
        eventually(lambda: not any(map(is_alive, left)), "no worker outlives the one that watches it", within_s=20)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_is_answered_by_a_time_of_draining_and_ctrl_c_is_not(
    redis_server: EmbeddedRedis, client: object, eventually: Eventually, workers: str
) -> None:
    environment = {"DP_BALANCER_URL": redis_server.url, "DP_BALANCER_POOL": "p"}
    with program("--workers", workers, "--drain-seconds", "3", **environment) as (process, port, _):
        eventually(lambda: answers(port), "it is ready", within_s=30)
        process.terminate()
        eventually(lambda: not answers(port), "new connections learn that it ends")
        assert answers(port, "/healthz")
        assert b"every" in get(port, "/v1/completions", {"prompt": "hi", "max_tokens": 1})
        assert process.wait(20) == 0
    with program("--workers", workers, "--drain-seconds", "60", **environment) as (process, port, _):
        eventually(lambda: answers(port), "it is ready", within_s=30)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_an_end_that_comes_while_a_worker_is_about_to_be_replaced_ends_all(
    redis_server: EmbeddedRedis, client: object, eventually: Eventually
) -> None:
    words = ("--workers", "2", "--engine", "http://127.0.0.1:1")
    with program(*words, DP_BALANCER_URL=redis_server.url, DP_BALANCER_POOL="p") as (process, _, _):
        eventually(lambda: len(children(process.pid)) == 2, "both are there")
        os.kill(children(process.pid)[0], signal.SIGKILL)
        eventually(lambda: len(children(process.pid)) == 1, "one has gone")
        process.terminate()
        assert process.wait(15) == 0


def test_a_port_that_is_taken_is_said(redis_server: EmbeddedRedis) -> None:
    command = [
        sys.executable,
        "-m",
        "balancer.cli",
        "serve",
        "--engine",
        "http://127.0.0.1:1",
        "--url",
        redis_server.url,
    ]
    done = subprocess.run([*command, "--port", str(redis_server.port)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("words", [("--tls-cert", "none.pem", "--tls-key", "none.pem"), ("--tokenizer", "none.json")])
def test_what_no_worker_could_begin_with_is_said_before_one_begins(
    redis_server: EmbeddedRedis, client: object, workers: str, words: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "balancer.cli", "serve", "--port", "0", "--url", redis_server.url, "--pool", "p"]
    command += ["--engine", "http://127.0.0.1:1", "--workers", workers, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert words[0] in done.stderr or "certificate" in done.stderr
