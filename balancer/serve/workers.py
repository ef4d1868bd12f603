"""The processes of `balancer serve`: one replica, or N on one port (SO_REUSEPORT), and how they end.

SIGTERM, which an orchestrator sends, is answered by a time of draining, in which whoever balances before the replicas
can learn from /readyz that this one ends; SIGINT, which a person sends, and the death of the process that watches are
not. Then the listener closes and what is under way may end. A second signal ends at once.

With several, this process only watches: it forks the workers before any thread or event loop exists, starts one again
that has died, and hands a signal to end on to all. Each worker is a replica like one on another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
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
from balancer.scripts import load_script, script_names
from balancer.serve.open_files import fitted
from balancer.serve.options import Options
from balancer.serve.tls import front_door
from balancer.serve.tokens import TokenCounter
from balancer.settings import Settings

log = logging.getLogger("balancer.serve")

_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 3.0
_ONE_SIGNAL_S = 1.0
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
    options = replace(options, limits=fitted(options.limits, len(options.engines)))
    for name in script_names():
        load_script(name)  # while there are open files
    sock = bound(options.host, options.port, shared)
    port = sock.getsockname()[1]
    if not shared:
        _run(options, settings, sock, lambda: ready(port))
        return
    _check(options)
    ready(port)
    samples = tempfile.mkdtemp(prefix="balancer-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = samples
    try:
        _watch(replace(options, port=port), settings, sock)
    finally:
        shutil.rmtree(samples, ignore_errors=True)


def _check(options: Options) -> None:
    """Raises `InvalidInput` for what no worker could begin with: it would be started again and again."""
    front_door(options)
    TokenCounter(options.tokenizer).close()


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

    ending = _Ending(owner)
    replica = Replica(options, settings)
    await replica.start(sock)
    await replica.wait_for_ranks(_PATIENCE_S)
    gc.collect()
    gc.freeze()  # what there is now stays: collections on the way of requests need not look at it again
    ready()
    if await ending.drains() and options.drain_s:
        replica.drain()
        log.info("pool=%s drains for %g s: not ready, new requests are still served", settings.pool, options.drain_s)
        await asyncio.sleep(options.drain_s)
    log.info("pool=%s stops: no new requests, %d connections", settings.pool, len(replica.server.clients))
    await replica.stop()


class _Ending:
    """The wish that this process end: a signal, or the end of the process that watches it.

    One signal may come twice: to all of a service at once, and handed on by the process that watches.
    """

    def __init__(self, owner: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._wished: asyncio.Future[bool] = self._loop.create_future()
        self._since = 0.0
        for number in _ENDINGS:
            self._loop.add_signal_handler(number, self._signalled, number)
        if owner is not None:  # a pipe that ends with that process
            self._loop.add_reader(owner, self._alone)

    async def drains(self) -> bool:
        """Wait for the wish; whether there is time to drain first."""
        return await self._wished

    def _signalled(self, number: signal.Signals) -> None:
        if not self._wished.done():
            self._since = self._loop.time()
            self._wished.set_result(number == signal.SIGTERM)
        elif self._loop.time() - self._since > _ONE_SIGNAL_S:
            self._loop.remove_signal_handler(number)
            os.kill(os.getpid(), number)

    def _alone(self) -> None:
        assert self._owner is not None
        self._loop.remove_reader(self._owner)
        if not self._wished.done():
            self._wished.set_result(False)


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
                os.kill(pid, ending[0])
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
                os.kill(pid, signum)

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
