"""The engine as a whole: open the ranks' ports, fork the ranks, say that they are ready, and end them
together.

One process per rank, forked from one that has imported everything: sixteen ranks start in the time of one
import. The parent serves nothing itself. It ends the engine cleanly when it is told to (SIGTERM, SIGINT) or
when its own parent has gone, and at once (SIGKILL, as a crash would) when a rank has died: a real engine
does not survive the loss of one either. If it is killed itself, the ranks notice by the barrier's pipes and
end.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import orjson

from scheduler_hooks.mock_engine.barrier import BarrierPipes, EngineGone
from scheduler_hooks.mock_engine.connections import ClientConnections
from scheduler_hooks.mock_engine.cost import CostModel
from scheduler_hooks.mock_engine.hook import HookSettings, build_hook, import_early
from scheduler_hooks.mock_engine.rank import Rank
from scheduler_hooks.mock_engine.scheduler import CHUNK_TOKENS, KV_CAPACITY_TOKENS, RankScheduler
from scheduler_hooks.mock_engine.step_log import StepLog

HOST = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"
_BACKLOG = 128
_LOOK_MS = 200
"""How often the parent looks whether its own parent is still there."""
_STOP_SECONDS = 10.0
"""How long ranks may take to end cleanly before they are killed: one long step and the hook's farewell."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a mock engine is like. `port` is rank 0's, the others follow; 0 lets the system choose them all.

    `host` is the name by which others reach it; with any but the default it listens on all interfaces, not on loopback
    alone. `speed` divides the length of steps; `hook` None runs without one; `stats` names the file of `step_log`.
    """

    name: str
    ranks: int
    port: int = 0
    host: str = HOST
    speed: float = 1.0
    idle_tick_ms: float = 100.0
    kv_capacity_tokens: int = KV_CAPACITY_TOKENS
    chunk_tokens: int = CHUNK_TOKENS
    cost: CostModel = field(default_factory=CostModel)
    hook: HookSettings | None = None
    stats: Path | None = None


def run(settings: EngineSettings) -> int:
    """Run the engine until it ends; returns the exit code: 0 after a clean stop, 1 when a rank died.

    Prints one line of JSON on stdout when all ranks have made their first step. Raises OSError when a port
    is taken or the statistics file cannot be made.
    """
    return _Engine(settings).run()


class _Engine:
    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._parent = os.getppid()
        self._told_to_stop = False
        self._pids: list[int] = []
        self._step_log = StepLog(settings.stats) if settings.stats else None
        interface = HOST if settings.host == HOST else _EVERYWHERE
        ports = (settings.port and settings.port + rank for rank in range(settings.ranks))
        self._listeners = [_listen(interface, port) for port in ports]
        self._ports: list[int] = [listener.getsockname()[1] for listener in self._listeners]
        self._addresses = [f"{settings.host}:{port}" for port in self._ports]
        self._store = _listen(HOST, 0)
        self._pipes = BarrierPipes(settings.ranks)
        self._ready_read, self._ready_write = os.pipe()
        self._signal_read, self._signal_write = os.pipe()

    def run(self) -> int:
        self._catch_signals()
        if self._settings.hook:
            import_early(self._settings.hook)
        if self._told_to_stop:
            return 0
        gc.collect()
        gc.freeze()  # the ranks' collectors leave the shared pages alone
        for rank in range(self._settings.ranks):
            pid = os.fork()
            if pid == 0:
                self._become(rank)
            self._pids.append(pid)
        self._pipes.keep_only_parent()
        for opened in (*self._listeners, self._store):
            opened.close()
        try:
            return self._supervise()
        finally:
            for pid in self._pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _supervise(self) -> int:
        """Wait for readiness, then for an end: told, orphaned, or a rank's death."""
        not_ready = self._settings.ranks
        while not (self._told_to_stop or os.getppid() != self._parent):
            for descriptor in self._wait(_LOOK_MS, [self._ready_read] if not_ready else []):
                if descriptor == self._ready_read:
                    not_ready -= len(os.read(self._ready_read, not_ready))
                    if not not_ready:
                        self._announce()
            if code := self._reap():
                return code
        return self._stop()

    def _stop(self) -> int:
        self._pipes.stop()
        deadline = time.monotonic() + _STOP_SECONDS
        code = 0
        while self._pids and time.monotonic() < deadline:
            self._wait(_LOOK_MS, [])
            code = self._reap() or code
        return 1 if self._pids else code

    def _reap(self) -> int:
        """Take note of ranks that have ended; 1 when one did not end cleanly."""
        code = 0
        for pid in list(self._pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._pids.remove(pid)
                if status:
                    print(f"{self._settings.name}: a rank (pid {pid}) died: {_how(status)}", file=sys.stderr)
                    code = 1
        return code

    def _wait(self, timeout_ms: int, others: list[int]) -> list[int]:
        """Wait for a signal (a rank's end is one) or for `others`; returns which of these are readable."""
        poll = select.poll()
        for descriptor in (self._signal_read, *others):
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(timeout_ms)]
        if self._signal_read in ready:
            ready.remove(self._signal_read)
            os.read(self._signal_read, 4096)
        return ready

    def _announce(self) -> None:
        ready = {
            "ready": True,
            "engine": self._settings.name,
            "address": self._addresses[0],
            "ranks": self._settings.ranks,
            "rank_ports": self._ports,
            "pids": self._pids,
        }
        sys.stdout.buffer.write(orjson.dumps(ready, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()

    def _catch_signals(self) -> None:
        os.set_blocking(self._signal_write, False)
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)

        def stop(signum: int, frame: object) -> None:
            self._told_to_stop = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)

    def _become(self, rank: int) -> NoReturn:
        """Be a rank, in the forked process, and end with it."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Ctrl-C reaches the whole process group; the ranks end together, when their parent says so.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._pipes.keep_only(rank)
            for index, listener in enumerate(self._listeners):
                if index != rank:
                    listener.close()
            self._serve(rank)
            code = 0
        except EngineGone:
            pass  # whoever ended has said why
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # past the parent's stack and what it registered to run at exit

    def _serve(self, rank: int) -> None:
        settings = self._settings
        hook = None
        if settings.hook:
            hook = build_hook(settings.hook, rank, settings.ranks, self._addresses, self._store)
        served = Rank(
            ClientConnections(self._listeners[rank]),
            RankScheduler(settings.kv_capacity_tokens, settings.chunk_tokens),
            settings.cost,
            self._pipes.barrier(rank, settings.speed, settings.idle_tick_ms),
            hook,
            self._step_log if rank == 0 else None,
        )
        served.serve(ready=self._tell_ready)
        served.close()

    def _tell_ready(self) -> None:
        os.write(self._ready_write, b".")


def _listen(interface: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((interface, port))
    listener.listen(_BACKLOG)
    return listener


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"
