"""Few open files: a replica counts what it may have, and blames no engine for what it lacks itself."""

from __future__ import annotations

import asyncio
import json
import resource
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.serve.engine import Engine, Exchange
from tests.serve.replica import Replica, is_openai_error, post

Engines = Callable[..., Engine]
Serve = Callable[..., Replica]
Wait = Callable[[], None]
ASK = post(b'{"messages": [{"role": "user", "content": "hello"}]}')


def test_a_low_soft_limit_is_raised(engines: Engines, serve: Serve, nothing_booked: Wait) -> None:
    replica = serve(engines().url, files=(96, 4_096))
    with ExitStack() as stack:
        crowd = [stack.enter_context(replica.raw()) for _ in range(400)]
        assert replica.chat()[0] == 200
        for raw in crowd[::40]:
            raw.send(ASK)
            assert raw.answer()[0] == 200
    assert "open files (ulimit -n) allow" in replica.log.read_text(), "but 20,000 clients are too many for 4,096"
    nothing_booked()


def test_more_clients_than_files_are_told_so_and_the_others_served(
    engines: Engines, serve: Serve, nothing_booked: Wait, eventually: Callable[..., None]
) -> None:
    replica = serve(engines().url, files=(168, 168))  # 50 clients and their engine's connections
    assert "168 open files (ulimit -n) allow 50 client connections, not 20000" in replica.log.read_text()
    with ExitStack() as stack:
        crowd = [stack.enter_context(replica.raw()) for _ in range(50)]
        for _ in range(20):
            with replica.raw() as late:
                status, body = late.answer()
                assert status == 503, "refused, not reset"
                assert is_openai_error(body)
        for raw in crowd:
            raw.send(ASK)
        assert {raw.answer()[0] for raw in crowd} == {200}, "who is connected is served, all at once"
    eventually(lambda: replica.chat()[0] == 200, "there is room again")
    assert "avoided" not in replica.log.read_text()
    assert "falls back" not in replica.log.read_text()
    nothing_booked()


def test_no_more_open_files_is_the_replicas_own_fault_and_passes(
    engines: Engines, serve: Serve, nothing_booked: Wait, eventually: Callable[..., None]
) -> None:
    engine, goes_on = engines(), threading.Event()
    completes = engine.script

    async def waits(exchange: Exchange) -> None:
        while not goes_on.is_set():
            await asyncio.sleep(0.01)
        await completes(exchange)

    engine.script = waits
    replica = serve(engine.url)
    process = replica.process.pid
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        first, *others, last = (stack.enter_context(replica.raw()) for _ in range(5))
        first.send(ASK)
        eventually(lambda: engine.open == 1, "one is under way")
        used = {int(path.name) for path in Path(f"/proc/{process}/fd").iterdir()}
        resource.prlimit(process, resource.RLIMIT_NOFILE, (min(set(range(max(used) + 2)) - used), limits[1]))
        time.sleep(2.5)  # the looks at the engine fail as well
        for raw in others:  # for connections that looks have left
            raw.send(ASK)
        last.send(ASK)
        status, body = last.answer()
        resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
        goes_on.set()
        assert (status, json.loads(body)["error"]["code"]) == (503, "no_open_files")
        assert first.answer()[0] == 200
        last.send(ASK)
        assert last.answer()[0] == 200, "the engine was not taken for dead"
    assert "avoided" not in replica.log.read_text()
    nothing_booked()
