"""Stacks of containers for the tests, by pytest-docker; one line of reason where there is no docker engine.

Images are built once per run from `docker/Dockerfile`. Every stack is a compose project of its own, brought up when a
test first wants it. What the tests measure is printed, and written to out/docker.md as the table of docker/README.md.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from pytest_docker.plugin import get_docker_services

from tests.integration.stack import DOCKER, Images, Stack

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PLAIN_URL = "redis://{redis}:6379/0"
Figures = Callable[[str, str], None]
Up = Callable[..., AbstractContextManager[Stack]]


def _missing() -> str | None:
    """Why the tests in containers cannot run here, or None."""
    for command, what in (
        (["docker", "version"], "docker engine"),
        (["docker", "compose", "version"], "docker compose v2"),
    ):
        try:
            if subprocess.run(command, capture_output=True).returncode:
                return f"no {what} answers"
        except FileNotFoundError:
            return "no docker on this machine"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    reason = _missing() if mine else None
    if reason and os.environ.get("CI") == "true":
        raise pytest.UsageError(
            f"tests/integration: {reason}, and in CI that is a failure (make test-docker starts one)"
        )
    if reason:  # said once: one test is skipped in the name of all
        mine[0].add_marker(pytest.mark.skip(reason=f"{reason}: {len(mine)} tests in containers are left out"))
        items[:] = [item for item in items if item not in mine[1:]]
        config.hook.pytest_deselected(items=mine[1:])


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """Say and keep what was measured: `figures("Redis paused 3 s", "…")`."""
    rows: list[tuple[str, str]] = []

    def say(what: str, measured: str) -> None:
        rows.append((what, measured))
        print(f"\n    {what}: {measured}")

    yield say
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    lines = ["| what happens | what was seen |", "|---|---|", *(f"| {what} | {measured} |" for what, measured in rows)]
    (out / "docker.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    """This tree's images, built, under a tag of this run's own: another checkout may be tested beside it."""
    images = Images(f"test-{os.getpid()}")
    os.environ["DPB_TAG"] = images.tag
    build = ["docker", "compose", "-f", str(DOCKER / "compose.yml"), "build", "--quiet"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield images
    subprocess.run(["docker", "image", "rm", *images.all], capture_output=True)  # layers stay, in the build's cache


@pytest.fixture(scope="session")
def up(images: Images) -> Up:
    """Bring a project up: `with up("tls", "compose.tls.yml") as stack:`."""

    @contextmanager
    def bring_up(
        name: str,
        *overlays: str,
        url: str = "redis://{redis}:6379/0",
        told: bool = True,
        image: str = "",
        tls: bool = False,
    ) -> Iterator[Stack]:
        project = f"dpb-{name}-{os.getpid()}"
        files = [str(DOCKER / file) for file in ("compose.yml", *overlays)]
        if told:
            files.append(str(HERE / "compose.tests.yml"))
        environment = {"DPB_REDIS_IMAGE": image} if image else {}
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            # Not as pytest-docker's own set-up: one that fails leaves its containers behind.
            with get_docker_services("docker compose", files, project, [], ["down -v -t 1"]) as services:
                stack = Stack(services, project, url)
                stack.compose("up --detach --wait --wait-timeout 120")
                if told and not tls:
                    stack.configure()
                yield stack

    return bring_up


@pytest.fixture(scope="session")
def plain(up: Up) -> Iterator[Stack]:
    """One Redis 7, one engine, three dispatchers that wait to be told."""
    with up("plain") as stack:
        yield stack
