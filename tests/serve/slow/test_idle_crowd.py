"""Ten thousand connections that ask nothing, or what open files allow: bounded memory, others are served as before."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import pytest

from tests.serve.engine import Engine
from tests.serve.replica import Raw, Replica

CROWD = 10_000
SPARE = 500
LEAST_FILES = 10_500
KIB_EACH = 24


def test_ten_thousand_idle_connections_cost_little_and_hold_up_nobody(
    engines: Callable[..., Engine], serve: Callable[..., Replica], nothing_booked: Callable[[], None]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        pytest.skip(f"ulimit -n allows {hard} open files, this needs {LEAST_FILES}")
    # A replica keeps a file for each client's engine: see balancer/serve/open_files.py.
    crowd_size = CROWD if hard == resource.RLIM_INFINITY else min(CROWD, (hard - SPARE) // 2)
    if soft < crowd_size + SPARE:
        resource.setrlimit(resource.RLIMIT_NOFILE, (crowd_size + SPARE, hard))
    replica = serve(engines().url, "--idle-timeout", "600")
    alone_s = _answer_s(replica)
    before_mib = replica.rss_mib()
    crowd = [Raw(replica.port) for _ in range(crowd_size)]
    try:
        beside_s = _answer_s(replica)
        grown_kib = (replica.rss_mib() - before_mib) * 1024 / crowd_size
        half = [raw for number, raw in enumerate(crowd) if number % 2]
        for raw in half:  # and half of them begin to ask, and stop
            raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        asking_s = _answer_s(replica)
        print(
            f"\n    {crowd_size} connections: {grown_kib:.1f} KiB each; an answer took {alone_s * 1e3:.1f} ms alone, "
            f"{beside_s * 1e3:.1f} ms beside them, {asking_s * 1e3:.1f} ms with half of them asking slowly"
        )
        assert grown_kib < KIB_EACH
        assert max(beside_s, asking_s) < max(10 * alone_s, 1.0)
    finally:
        for raw in crowd:
            raw.close()
    nothing_booked()


def _answer_s(replica: Replica) -> float:
    """The fastest of ten completions."""
    took = []
    for _ in range(10):
        began = time.monotonic()
        assert replica.chat()[0] == 200
        took.append(time.monotonic() - began)
    return min(took)
