"""What the serve benchmarks share: stub engine and load generator (C, built on first use), processes and their CPU.

CPU is the kernel's own clock of a process and its descendants, all threads, user and system time together (the clock
that clock_getcpuclockid(3) names; /proc/PID/stat counts the same in ticks of 10 ms). Where other work keeps the machine
busy, wall-clock numbers measure that work too: `least_disturbed` takes the best of several rounds, which is the nearest
to what a quiet machine would show.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILT = ROOT / "out" / "bench-serve"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
EVENTS_PER_STREAM = 33  # 32 chunks and [DONE]


def tool(name: str) -> Path:
    """The program built from NAME.c, built again when its source is newer."""
    source, program = HERE / f"{name}.c", BUILT / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SystemExit(f"{source.name} must be compiled: a C compiler is missing (apt install gcc)")
        BUILT.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(program), str(source)], check=True)
    return program


@contextmanager
def process(
    command: Sequence[str | Path], port: int, env: Mapping[str, str] | None = None, within_s: float = 60
) -> Iterator[int]:
    """A process that listens on `port`, until the block ends; yields its pid. It writes to a log beside the tools."""
    assert not listens(port), f"port {port} is taken"
    BUILT.mkdir(parents=True, exist_ok=True)
    log = BUILT / f"{port}.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            [str(word) for word in command], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + within_s
        while not listens(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{' '.join(map(str, command))} does not listen on {port}:\n{log.read_text()[-3000:]}"
                )
            time.sleep(0.05)
        yield child.pid
    finally:
        everyone = descendants(child.pid)
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pid in everyone:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def limited(pid: int, share: float) -> Iterator[None]:
    """A process and what it starts from now on may use `share` of a core, by the kernel's quota."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    group = (v1 if v1.exists() else v2) / f"balancer-bench-{pid}"
    try:
        group.mkdir()
        if v1.exists():
            (group / "cpu.cfs_period_us").write_text("10000")
            (group / "cpu.cfs_quota_us").write_text(f"{10_000 * share:.0f}")
        else:
            (group / "cpu.max").write_text(f"{10_000 * share:.0f} 10000")
        home = Path(f"/proc/{pid}/cgroup").read_text()
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise SystemExit(f"a process's share of a core cannot be limited here: {error} (root is needed)") from None
    try:
        yield
    finally:
        line = next(line for line in home.splitlines() if ":cpu:" in line or line.startswith("0::"))
        before = group.parent / line.rpartition(":")[2].lstrip("/")
        (before / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stub(port: int, gap_us: int = 0, chunks: int = 32) -> Any:
    """The stub engine on `port`; see stub.c."""
    return process([tool("stub"), str(port), str(chunks), str(gap_us)], port)


def load(port: int, connections: int, seconds: float, body: int = 1024, stream: bool = False, rate: float = 0) -> Any:
    """What load.c says of one run. Raises where an answer is lost or not the stub's."""
    command = [tool("load"), port, connections, seconds, body, int(stream), rate]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer = json.loads(done.stdout)
    if answer["errors"]:
        raise RuntimeError(f"port {port}: {answer['errors']} errors in {answer['requests']} requests")
    if stream and answer["requests"] and not answer["fewest_events"] == answer["most_events"] == EVENTS_PER_STREAM:
        raise RuntimeError(f"port {port}: {answer['fewest_events']} to {answer['most_events']} events in a stream")
    return answer


@dataclass(frozen=True)
class Load:
    """One kind of load; `rate` in requests per second, 0 where each connection sends the next request at once."""

    connections: int
    body: int = 1024
    stream: bool = False
    rate: float = 0
    spaced: bool = False  # chunks 5 ms apart instead of all at once

    @property
    def name(self) -> str:
        what = "stream" if self.stream else "plain"
        pace = f", {self.rate:g}/s" if self.rate else ""
        return f"{what}{' 5 ms' if self.spaced else ''} {self.body // 1024} KB, {self.connections} conn{pace}"


@dataclass(frozen=True)
class Measured:
    """One run: latencies in µs, CPU in µs per request (of the process under test, of Redis), resident memory in MiB."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    first_p50_us: float
    first_p99_us: float
    cpu_us: float
    rss_mib: float
    redis_cpu_us: float


def measure(pids: Sequence[int], port: int, what: Load, seconds: float, redis: int | None = None) -> Measured:
    """Load on `port` while the CPU of `pids` and their descendants is read, and that of `redis`; of none it is 0."""
    before, in_redis = sum(cpu_s(pid) for pid in pids), cpu_s(redis) if redis else 0
    answer = load(port, what.connections, seconds, what.body, what.stream, what.rate)
    spent, in_redis = sum(cpu_s(pid) for pid in pids) - before, (cpu_s(redis) if redis else 0) - in_redis
    requests = answer["requests"] * seconds / answer["seconds"] or float("nan")  # the warm-up costs CPU too
    total, first = answer["total_us"], answer["first_us"]
    if not answer["requests"]:  # a machine so busy that none came back in time
        total = first = {"p50": math.nan, "p99": math.nan}
    return Measured(
        requests_per_s=answer["requests"] / answer["seconds"],
        p50_us=total["p50"],
        p99_us=total["p99"],
        first_p50_us=first["p50"],
        first_p99_us=first["p99"],
        cpu_us=1e6 * spent / requests,
        rss_mib=sum(rss_mib(pid) for pid in pids),
        redis_cpu_us=1e6 * in_redis / requests,
    )


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far."""
    return sum(_cpu_s(one) for one in [pid, *descendants(pid)])


def rss_mib(pid: int) -> float:
    """Resident memory of a process and its descendants; pages they share are counted for each."""
    pages = 0
    for one in [pid, *descendants(pid)]:
        try:
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pages * PAGE_BYTES / 2**20


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def _cpu_s(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
    except OSError:
        return 0.0


def least_disturbed(runs: Sequence[Measured]) -> Measured:
    """Of each number the best over several runs of the same load."""
    best = {}
    for key in asdict(runs[0]):
        values = [value for run in runs if not math.isnan(value := getattr(run, key))]
        best[key] = (max if key == "requests_per_s" else min)(values, default=math.nan)
    return Measured(**best)


def write(name: str, document: Any) -> Path:
    """Numbers of a run as JSON, with the machine they were taken on."""
    path = BUILT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": sys.version.split()[0], "load_average": os.getloadavg()}
    path.write_text(json.dumps({"machine": machine, "results": document}, indent=2) + "\n", encoding="utf-8")
    return path
