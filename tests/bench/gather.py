"""The hook's gather among 16 processes on this machine's cores (gloo on loopback), as a share of a 20 ms step.

Beside it the collective that SGLang's DP attention does in each step anyway (an all-gather of six int64 over the same
kind of group), since 16 processes on few cores measure the scheduler of the operating system more than anything else.

As a program, `python -m tests.bench.gather ROUNDS`, it is the 16 processes; torch is imported once, before they fork.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import Row, in_turn, row

PROCESSES = 16
IDS_PER_GATHER = 256
STEP_US = 20_000
STEPS_PER_ROUND = 50


def among_processes(server: EmbeddedRedis, quick: bool) -> list[Row]:
    """p50 per round, at TP rank 0."""
    command = [sys.executable, "-m", "tests.bench.gather", "2" if quick else "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    gather, all_gather = json.loads(done.stdout)
    step = [float(STEP_US)] * len(gather)
    return [
        row("gather of 16 processes, p50", "all-gather of six int64", gather, all_gather),
        row("gather of 16 processes, p50", "a 20 ms step", gather, step, "%"),
    ]


def _p50_us(action: Callable[[], object], align: Callable[[], object]) -> float:
    spent = []
    for _ in range(STEPS_PER_ROUND):
        align()  # all come to a collective together, as from an engine's step
        begun = time.perf_counter_ns()
        action()
        spent.append((time.perf_counter_ns() - begun) / 1000)
    return statistics.median(spent)


def _process(rank: int, meeting: Path, rounds: int) -> None:
    import torch
    import torch.distributed as dist

    from scheduler_hooks.gather import TorchGather
    from scheduler_hooks.row import HEADER

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    hook = TorchGather(HEADER + IDS_PER_GATHER)
    line = array("q", bytes(8 * (HEADER + IDS_PER_GATHER)))
    mine, everybodys = torch.zeros(6, dtype=torch.int64), torch.empty(PROCESSES, 6, dtype=torch.int64)
    together = list(everybodys.unbind())

    measured = in_turn(
        rounds,
        lambda: _p50_us(lambda: hook.gather(line), dist.barrier),
        lambda: _p50_us(lambda: dist.all_gather(together, mine), dist.barrier),
    )
    if rank == 0:
        os.write(1, json.dumps(measured).encode())
    dist.barrier()


def main() -> None:
    import torch.distributed  # noqa: F401 - once, here, and not in every process after the fork

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    _process(rank, Path(folder, "meeting"), int(sys.argv[1]))
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
