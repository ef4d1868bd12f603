"""The routers that are compared, as processes: `balancer serve`, sglang-router, smg. And the ports that all use."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.serve import spread
from tests.bench.serve.harness import process

PORTS = int(os.environ.get("DPB_BENCH_PORT", "9540"))
"""The first of some three hundred ports that are used."""
ENGINE, SPACED_ENGINE, FRONT, RANKS = PORTS, PORTS + 1, PORTS + 10, PORTS + 60
OURS, FLOOR = "balancer serve", "httptools, one EVALSHA"


@dataclass(frozen=True)
class Router:
    """How one is started: `command` before its engines and its port."""

    name: str
    command: tuple[str, ...]
    engines_flag: str
    ends_each: bool = False  # the flag stands before each engine
    metrics_flag: str = ""

    def line(self, port: int, engines: Sequence[str]) -> list[str]:
        words = [self.engines_flag, *engines]
        if self.ends_each:
            words = [word for engine in engines for word in (self.engines_flag, engine)]
        more = [self.metrics_flag, str(port + 200)] if self.metrics_flag else []
        return [*self.command, "--host", "127.0.0.1", "--port", str(port), *more, *words]


def ours(redis_url: str, pool: str) -> Router:
    command = (sys.executable, "-m", "balancer.cli", "serve", "--url", redis_url, "--pool", pool, "--no-access-log")
    return Router(OURS, (*command, "--budget-ms", "5000"), "--engine", ends_each=True)


def peers(options: argparse.Namespace, policy: str) -> list[Router]:
    """The peers that were named, with one of their policies."""
    found = []
    if options.sglang_router:
        python = Path(options.sglang_router) / "python"
        command = (str(python), "-m", "sglang_router.launch_router", "--log-level", "warn", "--policy", policy)
        found.append(Router("sglang-router", command, "--worker-urls", metrics_flag="--prometheus-port"))
    if options.smg:
        program = Path(options.smg) / "smg"
        theirs = "least_load" if policy == "cache_aware" else policy
        command = (str(program), "launch", "--log-level", "warn", "--policy", theirs)
        found.append(Router("smg", command, "--worker-urls", metrics_flag="--prometheus-port"))
    return found


@contextmanager
def running(router: Router, port: int, engines: Sequence[str]) -> Iterator[int]:
    """The router before the engines, when it answers a completion; yields its pid."""
    with process(router.line(port, engines), port) as pid:
        deadline = time.monotonic() + 60
        while spread.status_of(port) != 200:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{router.name} on {port} serves no request")
            time.sleep(0.1)
        yield pid
