"""One embedded server: its private directory, its process, and the guard that ends both with their owner.

Knows processes and sockets only; `redis` is imported by the store alone.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from balancer.embedded import guard
from balancer.embedded.search import EmbeddedServerError, FoundServer, find_server

_START_ATTEMPTS = 5
_LOG_TAIL_BYTES = 2000


class EmbeddedRedis:
    """A Redis server of our own on 127.0.0.1, from `start` to `stop`, or as a context manager.

    Without `directory` it lives in a fresh private one (mode 0700), keeps nothing on disk, and `stop` removes
    all of it. With `directory` (made if missing, usable by one server at a time) every write is logged there
    (appendonly) and a later server on the same directory has the data again.

    `port` 0 takes a free one at the first start and keeps it, so that the address survives a restart.
    `server` None takes what `find_server` finds. The server stops at interpreter exit and when its owner is
    killed in whatever way; a process forked from the owner cannot stop it and does not keep it alive. One
    thread at a time may start or stop.
    """

    def __init__(
        self,
        server: FoundServer | None = None,
        *,
        port: int = 0,
        directory: str | os.PathLike[str] | None = None,
        start_timeout_s: float = 10.0,
    ) -> None:
        self._chosen_server = server
        self._chosen_port = port
        self._kept_directory = None if directory is None else Path(directory).absolute()
        self._start_timeout_s = start_timeout_s
        self._run: _Run | None = None

    def start(self) -> Self:
        """Start the server and wait until it answers PING.

        Raises EmbeddedServerError, with the end of the server's log, when it does not within
        `start_timeout_s` seconds; also when no server program is found, the port or the directory is in use,
        or it already runs.
        """
        if self._run is not None:
            raise EmbeddedServerError(f"the embedded Redis at {self.url} is already started: stop it first")
        server = self._chosen_server or find_server()
        deadline = time.monotonic() + self._start_timeout_s
        for attempt in range(1, _START_ATTEMPTS + 1):
            run = _Run(server, self._chosen_port or _free_port(), self._kept_directory)
            try:
                run.wait_until_ready(deadline)
            except _PortTaken as taken:
                run.end()
                # Between our finding a free port and the server's binding it, somebody else took it.
                if self._chosen_port or attempt == _START_ATTEMPTS:
                    raise EmbeddedServerError(
                        f"port {run.port} on 127.0.0.1 is in use: give another, or 0 for a free one"
                    ) from taken
            except BaseException:
                run.end()
                raise
            else:
                self._run = run
                self._chosen_port = run.port
                atexit.register(self.stop)
                return self
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """Stop the server, remove its private directory. Does nothing when repeated or in a forked child."""
        run = self._run
        if run is None or run.owner_pid != os.getpid():
            return
        self._run = None
        atexit.unregister(self.stop)
        run.end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server's process lives, as its owner sees it: also False once something killed it."""
        return self._run is not None and not self._run.has_ended()

    @property
    def url(self) -> str:
        """Address of database 0, `redis://127.0.0.1:PORT/0`."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._started.port

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        return self._started.server_pid

    @property
    def directory(self) -> Path:
        """Where its log is, and its data where they are kept."""
        return self._started.directory

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self._started.log_path

    @property
    def server(self) -> FoundServer:
        """The server program in use."""
        return self._started.server

    @property
    def _started(self) -> _Run:
        if self._run is None:
            raise EmbeddedServerError("the embedded Redis is not running: start it first")
        return self._run


class _PortTaken(Exception):
    """The server ended because it could not listen on its port."""


class _Run:
    """One life of one server: its directory, its process and the guard that ends both."""

    def __init__(self, server: FoundServer, port: int, kept_directory: Path | None) -> None:
        self.owner_pid = os.getpid()
        self.server = server
        self.port = port
        self.server_pid = 0  # until the guard has told
        self._is_private = kept_directory is None
        self.directory = kept_directory or Path(tempfile.mkdtemp(prefix="dp-balancer-redis-"))
        self.log_path = self.directory / "server.log"
        self._news = b""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            self._guard = self._start_guard()
        except BaseException as error:
            self._remove_private_directory()
            if isinstance(error, OSError):
                raise EmbeddedServerError(f"cannot start a server in {self.directory}: {error}") from error
            raise
        _runs.add(self)

    def _start_guard(self) -> subprocess.Popen[bytes]:
        settings = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "port": str(self.port),
            "daemonize": "no",
            "dir": str(self.directory),
            "logfile": str(self.log_path),
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no" if self._is_private else "yes",
        }
        command = [str(self.server.path)]
        for name, value in settings.items():
            command += [f"--{name}", value]
        private_directory = str(self.directory) if self._is_private else ""
        with self.log_path.open("ab") as log, _sole_user(self.directory) as lock:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, private_directory, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                pass_fds=(lock,),  # guard and server inherit the lock: it is free when both have ended
                start_new_session=True,  # Ctrl-C in the owner's terminal is for the owner alone
            )
        os.set_blocking(_pipe(process.stdout).fileno(), False)
        return process

    def wait_until_ready(self, deadline: float) -> None:
        """Return once the server answers PING; `deadline` is a time of time.monotonic()."""
        while not (self._hear() and _answers(self.port, self.server_pid)):
            if self.has_ended():
                log = self._log_tail()
                if "Failed listening on port" in log:
                    raise _PortTaken(log)
                raise EmbeddedServerError(f"{self.server.path} ended at once. Its log ends:\n{log}")
            if time.monotonic() > deadline:
                log = self._log_tail()
                raise EmbeddedServerError(f"{self.server.path} did not answer in time. Its log ends:\n{log}")
            time.sleep(0.005)  # a server tells nobody that it is ready: ask again

    def has_ended(self) -> bool:
        """Whether the server's process, or its guard and with it the server, has ended."""
        self._hear()
        return b"ended" in self._news or self._guard.poll() is not None

    def end(self) -> None:
        """End the server and its guard, and remove the directory where it is private."""
        _runs.discard(self)
        self.let_go()
        try:
            self._guard.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._remove_private_directory()  # the guard has done it, unless somebody killed the guard

    def let_go(self) -> None:
        """Close this process's ends of the guard's pipes; the guard acts when the last one is closed."""
        _pipe(self._guard.stdin).close()
        _pipe(self._guard.stdout).close()

    def _remove_private_directory(self) -> None:
        if self._is_private:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _hear(self) -> bool:
        """Read what the guard has told so far; whether it has told the server's process id."""
        with contextlib.suppress(OSError, ValueError):  # nothing new, or already closed
            self._news += os.read(_pipe(self._guard.stdout).fileno(), 100)
        if not self.server_pid and b"\n" in self._news:
            self.server_pid = int(self._news.split(b"\n")[0])
        return self.server_pid != 0

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip() or "(empty)"


def _answers(port: int, server_pid: int) -> bool:
    """Whether the server on this port answers PING and is ours, not a stranger that took the port first."""
    reply = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            while chunk := connection.recv(65536):
                reply += chunk
    except OSError:
        return False
    return reply.startswith(b"+PONG") and f"\r\nprocess_id:{server_pid}\r\n".encode() in reply


def _free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _sole_user(directory: Path) -> Iterator[int]:
    """A lock on the directory, as a file descriptor to inherit: two servers would write one log of data."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EmbeddedServerError(
                f"{directory} is in use by another embedded Redis: stop that one or give another directory"
            ) from error
        yield lock
    finally:
        os.close(lock)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """A stream that Popen was asked to make."""
    assert stream is not None
    return stream


# A forked child inherits our end of every guard's pipe and would keep its server alive after our death.
_runs: set[_Run] = set()


def _let_go_of_all() -> None:
    for run in list(_runs):
        run.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)
