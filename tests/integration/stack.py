"""The system in containers, and what can befall it: hands on `docker`, `docker compose` and a container's network."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from pytest_docker.plugin import Services
from redis.backoff import NoBackoff
from redis.retry import Retry

from balancer import PoolAdmin, Settings
from tests.integration.look import Watch

DOCKER = Path(__file__).parents[2] / "docker"
POOL = "demo"
PATIENT = {"DP_BALANCER_BUDGET_MS": "2000"}
"""Environment of a dispatcher that is to place all it is asked, however crowded the cores are."""
ENGINE_LEASE_MS = 2_500
BOOKING_LEASE_MS = 7_000
_READY_WITHIN_S = 30.0


class Images:
    """Images of one run of the tests: those of the tree and what is made of them."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.all = [self.of(target) for target in ("dispatcher", "engine", "serve")]

    def of(self, target: str) -> str:
        """The tree's image of that target."""
        return f"dp-balancer-{target}:{self.tag}"

    def build(self, name: str, *options: str) -> str:
        """Build another one; returns its tag."""
        tag = f"dpb-{name}:{self.tag}"
        docker("build", "--quiet", "-t", tag, *options)
        self.all.append(tag)
        return tag


class TrafficRun:
    """`scheduler_hooks.demo.traffic` in a dispatcher's container, until it is stopped."""

    def __init__(self, container: str, *options: str, environment: dict[str, str] | None = None) -> None:
        self.container = container
        settings = [word for name, value in (environment or {}).items() for word in ("-e", f"{name}={value}")]
        command = ["docker", "exec", "-i", *settings, container, "python", "-m", "scheduler_hooks.demo.traffic"]
        self.process = subprocess.Popen(
            [*command, "--until-eof", "--patience", "15", "--log-every", "1", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""

    def wait_ready(self) -> None:
        """Wait until Redis has placed a first request."""
        assert self.process.stdout
        limit = threading.Timer(_READY_WITHIN_S, self.process.kill)
        limit.start()
        line = self.process.stdout.readline()
        limit.cancel()
        assert line == '{"ready":true}\n', line + self.process.communicate()[1]

    def stop(self) -> dict[str, Any]:
        """Let it ask no more, wait for what is open; what it counted."""
        out, self.log = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, self.log
        counted: dict[str, Any] = json.loads(out)
        return counted

    def stop_when_done(self) -> dict[str, Any]:
        """Wait until it has asked all that it was to ask, and then as `stop`."""
        self.wait_ready()
        assert self.process.stdout
        line = self.process.stdout.readline()
        counted: dict[str, Any] = json.loads(line or "{}")
        self.log = self.process.communicate(timeout=10)[1]
        assert counted, self.log
        return counted

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Stack:
    """A running compose project."""

    def __init__(self, services: Services, project: str, url: str = "redis://{redis}:6379/0") -> None:
        self.services, self.project = services, project
        self._url = url
        self._passwords: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    # who is there

    def container(self, service: str, index: int = 1) -> str:
        """A container's name."""
        return f"{self.project}-{service}-{index}"

    @property
    def dispatchers(self) -> list[str]:
        """The containers of the dispatchers that wait to be told."""
        return [self.container("dispatcher", index) for index in (1, 2, 3)]

    def compose(self, command: str) -> str:
        """`docker compose …` on this project."""
        out: bytes = self.services._docker_compose.execute(command)
        return out.decode()

    def address(self, container: str) -> str:
        """A container's IP address."""
        return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)

    def url(self) -> str:
        """Redis as it is reached from this machine: services' names in braces become addresses."""
        for name in {part.split("}")[0] for part in self._url.split("{")[1:]}:
            if address := self.address(self.container(name)):
                self._addresses[name] = address  # one that is down keeps the address that it had
        return self._url.format_map(self._addresses)

    def password(self, user: str) -> str:
        """A user's password, out of the volume where it was drawn."""
        if user not in self._passwords:
            folder = {"dispatcher": "dispatcher/password", "hook": "hook/password"}.get(user, f"dpb/{user}")
            self._passwords[user] = self.compose(
                f"run --rm --no-deps -T --entrypoint cat secrets /run/{folder}"
            ).strip()
        return self._passwords[user]

    # Redis, by hand

    def settings(self, user: str, budget_ms: int = 1_000) -> Settings:
        """Settings for a user, from this machine."""
        url = self.url()
        asked = self.password("sentinels") if "+sentinel" in url else None
        return Settings(url, user, self.password(user), sentinel_password=asked, pool=POOL, budget_ms=budget_ms)

    def client(self, user: str, service: str = "redis") -> redis.Redis:
        """A plain client of a user, from this machine."""
        return plain_client(self.address(self.container(service)), username=user, password=self.password(user))

    def admin(self, service: str = "redis") -> redis.Redis:
        """A plain client of the one user that may do anything."""
        return self.client("admin", service)

    def watch(self) -> Watch:
        """Looks at the pool, from this machine, as the reader."""
        return Watch(self.settings("reader"))

    def configure(self, **changes: object) -> None:
        """Leases short enough for a test, and what else it wants."""
        admin = PoolAdmin(self.settings("admin", budget_ms=5_000))
        admin.configure(**{"engine_lease_ms": ENGINE_LEASE_MS, "booking_lease_ms": BOOKING_LEASE_MS, **changes})
        admin.close()

    # load

    def traffic(self, container: str, rate: float = 40, *options: str, **environment: str) -> TrafficRun:
        """Requests out of a dispatcher's container, with short answers."""
        return TrafficRun(container, "--rate", str(rate), "--max-output", "30", *options, environment=environment)

    def python(self, container: str, program: str, *arguments: str) -> subprocess.Popen[str]:
        """A program in a container; what it prints comes back."""
        command = ["docker", "exec", "-i", container, "python", "-c", program, *arguments]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    # what can befall it

    @contextmanager
    def paused(self, service: str) -> Iterator[None]:
        """A container that is there and says nothing."""
        wait_until(lambda: self._pause(service), "the container is paused")
        try:
            yield
        finally:
            docker("unpause", self.container(service))

    def _pause(self, service: str) -> bool:
        """A kernel may need a second try to freeze a container that is busy."""
        return not subprocess.run(["docker", "pause", self.container(service)], capture_output=True).returncode

    @contextmanager
    def killed(self, service: str) -> Iterator[None]:
        """A container that is gone, and comes back."""
        docker("kill", self.container(service))
        try:
            yield
        finally:
            docker("start", self.container(service))

    @contextmanager
    def disconnected(self, service: str) -> Iterator[None]:
        """A container without its network."""
        container, network = self.container(service), f"{self.project}_pool"
        docker("network", "disconnect", network, container)
        try:
            yield
        finally:
            # The service's name is an alias that a plain connect does not give back.
            docker("network", "connect", "--alias", service, network, container)

    @contextmanager
    def cut(self, container: str, peer: str, *chains: str) -> Iterator[None]:
        """Packets between a container and a peer are dropped: those coming in (INPUT), those going out (OUTPUT)."""
        address = self.address(peer)
        rules = [[chain, "-s" if chain == "INPUT" else "-d", address, "-j", "DROP"] for chain in chains]
        for rule in rules:
            self._in_network_of(container, "iptables", "-A", *rule)
        try:
            yield
        finally:
            for rule in rules:
                self._in_network_of(container, "iptables", "-D", *rule)

    def _in_network_of(self, container: str, *command: str) -> None:
        """A command of this machine in a container's network, which needs root and nothing of the image."""
        pid = docker("inspect", "-f", "{{.State.Pid}}", container)
        as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        subprocess.run([*as_root, "nsenter", "-t", pid, "-n", *command], check=True, capture_output=True)


def plain_client(host: str, **credentials: str) -> redis.Redis:
    """The driver's client without its patience: it tries again what was refused, for seconds."""
    return redis.Redis(host, protocol=2, socket_timeout=5, retry=Retry(NoBackoff(), 0), **credentials)  # type: ignore[arg-type]


def docker(*words: str) -> str:
    """`docker …`; what it prints."""
    done = subprocess.run(["docker", *words], text=True, capture_output=True)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout.strip()


def wait_until(condition: Callable[[], object], what: str, within_s: float = 20.0) -> float:
    """Wait until a condition holds; returns how many ms that took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)
    return (time.monotonic() - began_s) * 1e3


def added(counted: Sequence[dict[str, Any]], *path: str) -> int:
    """A count, summed over dispatchers."""
    total = 0
    for one in counted:
        value: Any = one
        for name in path:
            value = value.get(name, 0) if isinstance(value, dict) else 0
        total += value
    return total


def booked(counted: Sequence[dict[str, Any]]) -> int:
    """Requests that Redis placed, at once or when it was asked again because an answer was late."""
    return added(counted, "answers", "placed") + added(counted, "answers", "repeated")
