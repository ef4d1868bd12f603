"""vLLM's real AsyncLLM and output processor: a request that nobody wants any more while the pool is asked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from balancer.embedded import EmbeddedRedis
from tests.engines.vllm.kit import PYTHON, SIMULATED, free_of_ours, need_vllm


@pytest.fixture(scope="module")
def said(redis_server: EmbeddedRedis) -> dict[str, Any]:
    """What is left of each story, played in one process of vLLM's Python."""
    need_vllm()
    ours = {"URL": redis_server.url, "POOL": "slim", "ENGINE": "e0", "DISPATCH": "1"}
    environment = free_of_ours() | SIMULATED | {f"DP_BALANCER_{name}": value for name, value in ours.items()}
    command = [PYTHON, Path(__file__).with_name("registration_run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_stays_has_its_request_sent(said: dict[str, Any], n: int) -> None:
    found = said[f"stays {n}"]
    assert (found["sent"], found["registered"]) == (["ADD"] * n, n)
    assert found["aborts"] > 0, "and aborted on its ranks when it goes then"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("story", "end"), [("goes", "cancelled"), ("aborted", "1")])
def test_what_nobody_wants_is_not_sent_and_nothing_of_it_stays(
    said: dict[str, Any], story: str, end: str, n: int
) -> None:
    assert said[f"{story} {n}"] == {"end": end, "registered": [], "sent": [], "in_flight": [], "booked": 0}
