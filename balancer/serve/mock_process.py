"""The mock engine in a process of its own: it ends when its owner does, because its standard input ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from balancer.errors import BalancerError
from balancer.serve.mock import MockEngine
from balancer.serve.workers import bound


@contextmanager
def mock_process(ranks: int, port: int = 0, first_ms: float = 20, token_ms: float = 5) -> Iterator[int]:
    """A mock engine on loopback; yields its port."""
    command = [sys.executable, "-m", "balancer.serve.mock_process", str(ranks), str(port), str(first_ms), str(token_ms)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin
    assert process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise BalancerError("the mock engine did not start")
        yield int(line)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        process.stdout.close()


async def _serve(ranks: int, port: int, first_ms: float, token_ms: float) -> None:
    engine = MockEngine(ranks, first_ms / 1000, token_ms / 1000)
    sock = bound("127.0.0.1", port)
    await engine.start(sock)
    print(sock.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, lambda: os.read(0, 1))
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
