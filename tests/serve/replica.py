"""A replica of `balancer serve` in a process of its own, and the raw socket that hostile clients use."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READY_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Replica:
    """`balancer serve` before `engines` (each as the command line takes it), ready; `files`: its limits (ulimit -n)."""

    def __init__(
        self,
        redis_url: str,
        engines: Sequence[str],
        *options: str,
        log: Path,
        files: tuple[int, int] | None = None,
        **env: str,
    ) -> None:
        self.port = free_port()
        self.log = log
        given = dict(itertools.pairwise(options))
        self._tls = ssl.create_default_context(cafile=given["--tls-cert"]) if "--tls-cert" in given else None
        command = [sys.executable, "-m", "balancer.cli", "serve", "--pool", "p", "--port", str(self.port)]
        command += ["--drain-seconds", "0"]
        for engine in engines:
            command += ["--engine", engine]
        environment = os.environ | {"DP_BALANCER_URL": redis_url, "DP_BALANCER_BUDGET_MS": "2000"} | env
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=out,
                stderr=out,
                env=environment,
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, files)) if files else None,
            )
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the replica did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _is_ready(self) -> bool:
        try:
            return self.request("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def connect(self, timeout_s: float = 20.0) -> http.client.HTTPConnection:
        if self._tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout_s, context=self._tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 20.0,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (names in lower case), body."""
        with contextlib.closing(self.connect(timeout_s)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def chat(self, **more: Any) -> tuple[int, dict[str, str], bytes]:
        """A chat completion."""
        headers = more.pop("headers", None)
        document = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], **more}
        return self.request("POST", "/v1/chat/completions", document, headers)

    def raw(self, data: bytes = b"") -> Raw:
        """A socket on which a test writes what it likes."""
        return Raw(self.port, data)

    def rss_mib(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *exc: object) -> None:
        self.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    """A request as bytes."""
    lines = [b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def is_openai_error(body: bytes) -> bool:
    """Whether an error has the shape that OpenAI's clients read."""
    error = json.loads(body)["error"]
    return isinstance(error["message"], str) and bool(error["message"]) and {"type", "code"} <= error.keys()


class Raw:
    """A TCP connection to a replica."""

    def __init__(self, port: int, data: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.send(data)

    def send(self, data: bytes) -> None:
        """Write; a peer that has closed is no error of the test."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def all(self, timeout_s: float = 20.0) -> bytes:
        """Everything up to the end of the connection. Raises TimeoutError where it does not end."""
        self.socket.settimeout(timeout_s)
        pieces = []
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(65536):
                pieces.append(piece)
        return b"".join(pieces)

    def until(self, mark: bytes, timeout_s: float = 20.0) -> bytes:
        """Everything up to and with `mark`, or to the end of the connection."""
        self.socket.settimeout(timeout_s)
        seen = b""
        with contextlib.suppress(ConnectionError):
            while mark not in seen:
                piece = self.socket.recv(65536)
                if not piece:
                    break
                seen += piece
        return seen

    def answer(self, timeout_s: float = 20.0) -> tuple[int, bytes]:
        """One answer with a length: status and body; (0, b"") where the connection ends without one."""
        seen = self.until(b"\r\n\r\n", timeout_s)
        head, end, body = seen.partition(b"\r\n\r\n")
        if not end:
            return 0, seen
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
        )
        while len(body) < length and (piece := self.socket.recv(65536)):
            body += piece
        return int(head[9:12]), body

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
