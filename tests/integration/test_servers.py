"""The servers that the project supports, each under load, with scripts flushed, and across a restart with its data."""

from __future__ import annotations

import pytest

from tests.crowd import crowd
from tests.integration.conftest import Figures, Up
from tests.integration.endure import BUDGET_MS, SLACK_MS, endure
from tests.integration.stack import PATIENT, added, booked, wait_until

SERVERS = {"Redis 8": ("redis:8", ()), "Valkey 8": ("", ("compose.valkey.yml",))}
"""Redis 7 is what the other tests run on."""


@pytest.mark.parametrize("server", SERVERS)
def test_it_serves_and_comes_back(up: Up, figures: Figures, server: str) -> None:
    image, overlays = SERVERS[server]
    with up(server.split()[0].lower(), *overlays, image=image) as stack:
        info = stack.admin().info("server")
        name, version = server.split()
        found = info.get("valkey_version" if name == "Valkey" else "redis_version")
        assert str(found).startswith(f"{version}.")
        with stack.watch() as watch:
            options = ("--requests", "300", "--max-input", "1024")
            runs = [stack.traffic(container, 100, *options, **PATIENT) for container in stack.dispatchers]
            stack.admin().script_flush()
            counted = [run.stop_when_done() for run in runs]
            wait_until(lambda: watch.sees("is_empty"), "the pool is empty")
        assert booked(counted) == added(counted, "ends", "finished") == 900
        assert not watch.mistakes, watch.mistakes[:5]
        settings = stack.admin().hgetall("dpb:{demo}:pool")
        endured = endure(stack, stack.killed("redis"), hold_s=2.0, after_s=2.5)
        figures(f"{server} ({found}): 900 placed and finished, then killed for 2 s", str(endured))
        assert endured.slowest_ms <= BUDGET_MS + SLACK_MS * crowd()
        kept = stack.admin().hgetall("dpb:{demo}:pool")
        assert {name: kept.get(name) for name in settings if name.endswith(b"_ms")} == {
            name: value for name, value in settings.items() if name.endswith(b"_ms")
        }
