"""The README does not lie: its example prints what it says, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from balancer import NoRankReason, Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", "out"} & set(path.parts))


def block(mark: str) -> str:
    """The code block that follows `<!-- mark -->`."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"no block marked {mark!r}"
    return found[1]


def run_example(settings: Settings) -> str:
    assert settings.url
    environment = {**os.environ, "DP_BALANCER_URL": settings.url, "DP_BALANCER_BUDGET_MS": "2000"}
    done = subprocess.run(
        [sys.executable, "-c", block("example: python")], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_example_prints_what_the_readme_says(settings: Settings, client: redis.Redis) -> None:
    assert run_example(settings) == block("example: output")


def test_redis_cli_shows_what_the_readme_says(settings: Settings, client: redis.Redis) -> None:
    run_example(settings)
    loads = [part for rank, load in client.zrange("dpb:{chat}:loads", 0, -1, withscores=True) for part in (rank, load)]
    shown = block("redis-cli").splitlines()
    assert [str(part).removesuffix(".0") for part in loads] == shown[1:9]
    without_life = re.compile(r"(?<= )\d+(?= gateway)")
    bookings = {without_life.sub("LIFE", line) for line in client.hvals("dpb:{chat}:bookings")}
    assert bookings == {without_life.sub("LIFE", line) for line in shown[10:]}


def test_status_shows_what_the_readme_says(settings: Settings, client: redis.Redis) -> None:
    run_example(settings)
    done = subprocess.run(
        [sys.executable, "-m", "balancer.cli", "status", "chat", "--url", settings.url or ""],
        capture_output=True,
        text=True,
        check=True,
    )

    def steady(text: str) -> list[list[str]]:
        """Words without what differs from run to run: times, ports, epochs."""
        text = re.sub(r"redis://\S+|\d{13}|[\d.,]+ m?s( ago)?|ends in \S+", "*", text)
        return [line.split() for line in text.splitlines() if line and not line.startswith("$")]

    assert steady(done.stdout) == steady(block("status"))


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^ +|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_linked_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_reason_for_no_rank_has_advice() -> None:
    from balancer import NoRank

    for reason in NoRankReason:
        assert len(str(NoRank("p", reason))) > 60
