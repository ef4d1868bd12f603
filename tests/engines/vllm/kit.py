"""What the tests on real vLLM share: a server from the engine kit, its Redis, the audit's lines, and HTTP to it.

The kit lies beside this checkout (`../shared/engines`, state under ENGINES_HOME). Starting a server takes minutes on a
crowded machine; with VLLM_KIT_KEEP=1 servers stay up when the tests end and are used again by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from balancer import Dispatcher, PoolAdmin, Settings
from balancer.embedded import EmbeddedRedis

ROOT = Path(__file__).parents[3]
KIT = ROOT.parent / "shared" / "engines" / "vllm"
HOME = Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "engines")
PYTHON = HOME / "vllm" / "bin" / "python"
KEEP = os.environ.get("VLLM_KIT_KEEP") == "1"
PORT = int(os.environ.get("VLLM_KIT_PORT") or 8000)
"""First of the ports that servers take; Redis takes those from PORT + 400 on."""

READY_S = 1_500
SIMULATED = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What the kit sets for vLLM without a GPU, for a vLLM that runs in a test's own process."""


def need_vllm() -> None:
    """Skip where there is no vLLM to test with, and fail in CI, where a skip would hide that nothing was tested."""
    missing = None
    if not PYTHON.exists():
        missing = f"no vLLM in {HOME}: run `make vllm-ready` (needs the kit at {KIT})"
    elif subprocess.run([PYTHON, "-c", "import scheduler_hooks.vllm"], capture_output=True, check=False).returncode:
        missing = f"dp-balancer is not installed beside vLLM: {PYTHON} -m pip install -e {ROOT}"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


def free_of_ours() -> dict[str, str]:
    """This process' environment without the project's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DP_BALANCER_", "VLLM_"))}


@dataclass
class VllmServer:
    """A vLLM from the kit with the plugin in it. `name`: of its audit, and of its pool where `pool` names none, as the
    nodes of one deployment do that share one; `port`: of its API.

    `audited`: its scheduler is `audit.AuditedScheduler`, which writes what the hook said beside the truth.
    """

    name: str
    redis_url: str
    port: int
    ranks: int = 4
    api_servers: int = 4
    model: str = "tiny-dense"
    audited: bool = True
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    pool: str = ""

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.audit = HOME / "audit" / self.name
        self.log = HOME / "run" / f"{self.port}.log"
        self.pool = self.pool or self.name
        self.settings = Settings(url=self.redis_url, pool=self.pool, budget_ms=5_000)

    def start(self) -> None:
        """Start it, or find it running where servers are kept."""
        if KEEP and answers(self.port):
            return
        self.audit.mkdir(parents=True, exist_ok=True)
        for old in self.audit.iterdir():
            old.unlink()
        environment = free_of_ours() | {
            "ENGINES_HOME": str(HOME),
            "READY_S": str(READY_S),
            "MODEL": self.model,
            "DP_BALANCER_URL": self.redis_url,
            "DP_BALANCER_POOL": self.pool,
            "DP_BALANCER_DISPATCH": "1",
            "DP_BALANCER_BUDGET_MS": "2000",  # for a machine where a turn on the CPU may take as long
            "PYTHONPATH": str(Path(__file__).parent),
            "VLLM_AUDIT": str(self.audit),
        }
        audit = ("--scheduler-cls", "audit.AuditedScheduler") if self.audited else ()
        numbers = (str(self.port), str(self.ranks), str(self.api_servers))
        command = [str(KIT / "serve"), *numbers, "--max-num-seqs", "64", *audit, *self.flags]
        subprocess.run(command, env=environment | self.environment, check=True, timeout=READY_S + 60)

    def stop(self) -> None:
        """Stop it, unless servers are kept."""
        if not KEEP:
            self.end()

    def end(self) -> None:
        """Stop it."""
        subprocess.run(
            [str(KIT / "stop"), str(self.port)], env=free_of_ours() | {"ENGINES_HOME": str(HOME)}, check=True
        )

    def is_well(self) -> bool:
        """Whether its /health says so."""
        return answers(self.port)

    def session(self) -> int:
        """Id of the session that all its processes are in."""
        return int((HOME / "run" / f"{self.port}.pid").read_text().split()[0])

    def engine_pids(self) -> list[int]:
        """Process ids of its EngineCores, by rank."""
        session = self.session()
        found: dict[int, int] = {}
        for line in subprocess.check_output(["ps", "-eo", "pid,sid,args"], text=True).splitlines()[1:]:
            pid, sid, arguments = line.split(None, 2)
            if int(sid) == session and "EngineCore" in arguments:
                found[int(arguments.split("_DP")[1].split()[0]) if "_DP" in arguments else 0] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def bench(self, *flags: str, timeout_s: float = 580) -> dict[str, Any]:
        """vLLM's own load generator against it; its result as JSON."""
        out = self.audit / f"bench-{time.monotonic_ns()}.json"
        command = [str(KIT / "bench"), self.url, "--save-result", "--result-filename", str(out), *flags]
        done = subprocess.run(
            command,
            env=free_of_ours() | {"ENGINES_HOME": str(HOME)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text())  # type: ignore[no-any-return]

    def audited_steps(self) -> dict[str, dict[int, Audit]]:
        """What the audit wrote: by rank and step."""
        found: dict[str, dict[int, Audit]] = {}
        for path in sorted(self.audit.glob("*.jsonl")):
            lines = [Audit(*json.loads(line)) for line in path.read_text().splitlines() if line.endswith("]")]
            found[path.stem] = {line.step: line for line in lines}
        return found

    def report_ms(self) -> dict[str, float]:
        """How long reports to Redis took, of all ranks together, and how long their thread got no CPU in them (ms)."""
        texts = [path.read_text() for path in self.audit.glob("*.reports")]
        lines = [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("]")]
        if not lines:
            return {}
        took, waited = sorted(line[2] for line in lines), sorted(line[4] for line in lines)
        at = {"p50": len(lines) // 2, "p99": int(len(lines) * 0.99)}
        return {name: took[i] for name, i in at.items()} | {f"no_cpu_{name}": waited[i] for name, i in at.items()}

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, str]:
        """One request; its status and answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            head = {"Content-Type": "application/json", **(headers or {})}
            connection.request("POST", path, json.dumps({"model": "tiny", **body}), head)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def hang_up(self, path: str, body: dict[str, Any], after_bytes: int) -> None:
        """A streamed request whose client goes after so many bytes of the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            text = json.dumps({"model": "tiny", "stream": True, **body})
            connection.request("POST", path, text, {"Content-Type": "application/json"})
            if after_bytes:
                connection.getresponse().read(after_bytes)


@dataclass(frozen=True, slots=True)
class Audit:
    """One hand-over: what the hook said and what the scheduler's requests sum up to (tokens, requests, pending tokens,
    KV usage in thousandths), ids received, when (ms), and in which of the scheduler's own steps."""

    step: int
    said: list[int]
    own: list[int]
    received: int
    at_ms: int
    turn: int

    @property
    def is_right(self) -> bool:
        return self.said == self.own


def answers(port: int) -> bool:
    """Whether a server's /health says that it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


@contextlib.contextmanager
def redis_on(port: int) -> Iterator[str]:
    """The address of a Redis on this port: our own, or the one that runs there where servers are kept."""
    with contextlib.suppress(OSError):
        if KEEP and b"PONG" in ping(port):
            yield f"redis://127.0.0.1:{port}/0"
            return
    with EmbeddedRedis(port=port) as server:
        yield server.url
    with contextlib.suppress(OSError):
        ping(port, b"SHUTDOWN NOSAVE")  # one that a story has put in its place


def ping(port: int, word: bytes = b"PING") -> bytes:
    """What a server answers to PING, or to another word."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(word + b"\r\n")
        return connection.recv(64)


def until(condition: Callable[[], object], what: str, within_s: float = 60.0) -> float:
    """Wait until a condition holds; how many seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - start


def at_rest(settings: Settings, within_s: float = 120.0) -> None:
    """Wait until a pool holds nothing and nothing is in flight."""
    with Dispatcher(settings) as looker:

        def nothing_left() -> bool:
            found = looker.snapshot()
            return not found.bookings and all(rank.load_tokens == rank.requests == 0 for rank in found.ranks)

        until(nothing_left, f"pool {settings.pool} at rest: {looker.snapshot()}", within_s)


def at_once(works: list[Callable[[], Any]], width: int = 16) -> list[Any]:
    """Run these in threads."""
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(lambda work: work(), works))


def configure(settings: Settings, **changes: Any) -> None:
    """Settings of a pool, all at once for everybody."""
    admin = PoolAdmin(settings)
    try:
        admin.configure(**changes)
    finally:
        admin.close()
