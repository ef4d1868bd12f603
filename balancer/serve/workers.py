"""The processes of `balancer serve`: one replica, or N on one port (SO_REUSEPORT), and how they end.

With several, this process only watches: it forks the workers before any thread or event loop exists, starts one again
that has died, and hands a signal to end on to all. Each worker is a replica like one on another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from balancer.errors import InvalidInput
from balancer.serve.options import Options
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")

_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 3.0
_AGAIN_S = 1.0
"""A worker that dies at once is started again no oftener."""


def bound(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening address; raises `InvalidInput` where it cannot be had. `shared`: by several processes."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        raise InvalidInput(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    sock.setblocking(False)
    return sock


def serve(options: Options, settings: Settings, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is called with the port: by one replica when it has ranks to give or has
    waited for them for a moment, by several processes when the address is theirs."""
    shared = options.workers > 1
    sock = bound(options.host, options.port, shared)
    port = sock.getsockname()[1]
    if not shared:
        _run(options, settings, sock, lambda: ready(port))
        return
    ready(port)
    samples = tempfile.mkdtemp(prefix="balancer-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = samples
    try:
        _watch(replace(options, port=port), settings, sock)
    finally:
        shutil.rmtree(samples, ignore_errors=True)


def _run(
    options: Options, settings: Settings, sock: socket.socket, ready: Callable[[], None], owner: int | None = None
) -> None:
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_replica(options, settings, sock, ready, owner))


async def _replica(
    options: Options, settings: Settings, sock: socket.socket, ready: Callable[[], None], owner: int | None
) -> None:
    from balancer.serve.replica import Replica

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _ENDINGS:
        loop.add_signal_handler(number, ended.set)
    if owner is not None:  # a pipe that ends with the process that watches us
        loop.add_reader(owner, ended.set)
    replica = Replica(options, settings)
    await replica.start(sock)
    await replica.wait_for_ranks(_PATIENCE_S)
    ready()
    await ended.wait()
    if owner is not None:
        loop.remove_reader(owner)
    for number in _ENDINGS:  # a second one ends at once
        loop.remove_signal_handler(number)
    log.info("pool=%s stops: no new requests, %d connections", settings.pool, len(replica.server.clients))
    await replica.stop()


def _watch(options: Options, settings: Settings, held: socket.socket) -> None:
    """Fork the workers and keep them. `held` keeps the port ours; nobody listens on it."""
    ending: list[int] = []
    workers: dict[int, int] = {}
    owner, ours = os.pipe()

    def begin(number: int) -> None:
        pid = os.fork()
        if pid:
            workers[pid] = number
            if ending:  # it came between the fork and this
                os.kill(pid, signal.SIGTERM)
            return
        code = 1
        try:
            for signum in _ENDINGS:
                signal.signal(signum, signal.SIG_DFL)
            if ending:
                os._exit(0)
            held.close()
            os.close(ours)
            own = replace(settings, name=f"{settings.name[:56]}-w{number}")
            _run(options, own, bound(options.host, options.port, shared=True), lambda: None, owner)
            code = 0
        except KeyboardInterrupt:
            code = 0
        except BaseException:
            log.exception("worker %d has died", number)
        finally:
            logging.shutdown()
            os._exit(code)

    def end(signum: int, _: object) -> None:
        ending.append(signum)
        for pid in tuple(workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    for signum in _ENDINGS:
        signal.signal(signum, end)
    for number in range(options.workers):
        if not ending:
            begin(number)
    while workers:
        pid, status = os.wait()
        number = workers.pop(pid, -1)
        for gauge in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob(f"gauge_live*_{pid}.db"):
            gauge.unlink()  # what it held it holds no more
        if number >= 0 and not ending:
            log.warning("worker %d (pid %d) has ended with status %d: started again", number, pid, status)
            time.sleep(_AGAIN_S)
            if not ending:
                begin(number)
