"""Processes like SGLang's schedulers under DP attention, with our hooks, joined by gloo; run by `test_sglang_gather`.

    python sglang_processes.py '{"url": …, "meeting": "tcp://…", "world": 4, "mine": [0, 1], "attn_tp": 2, …}'

Each process plays SGLang's loop: take requests, exchange batch sizes with all others (all_gather on the TP group's CPU
group, SGLang's own collective), step or be idle. `without` lists processes that have no plugin, `other` such as were
given other settings, `clumsy` such as cannot build their side of the gather. Requests come when the file `begin` is
there, or at once. A process says what came of it in one line of JSON at its end. `interface`: where gloo listens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

from balancer import Settings
from scheduler_hooks import gather
from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.sglang import scheduling
from scheduler_hooks.sglang.scheduling import Scheduling

TOKENS = 7


class Process:
    """One process of the TP group: its DP rank is led by the first of `attn_tp` processes."""

    def __init__(self, plan: dict[str, Any], number: int) -> None:
        import torch.distributed as dist

        attn_tp = plan["attn_tp"]
        self.ranks = plan["world"] // attn_tp
        self.leads = number % attn_tp == 0
        self.held = 0
        group = dist.new_group(list(range(plan["world"])), backend="gloo")
        writer = SimpleNamespace(dp_rank=number // attn_tp) if self.leads else None
        self.scheduler = SimpleNamespace(
            load_snapshot_writer=writer,
            ipc_channels=SimpleNamespace(recv_from_tokenizer=None),
            server_args=SimpleNamespace(host="127.0.0.1", port=30000, nnodes=1, sleep_on_idle=False),
            req_to_token_pool=SimpleNamespace(available_size=lambda: 1_000_000 - self.held),
            load_inquirer=SimpleNamespace(get_loads=self._loads),
            chunked_req=None,
            tp_cpu_group=group,
        )
        self.hooks = None
        if number in plan["clumsy"]:
            gather.TorchGather = None
        if number not in plan["without"]:
            every = 2 if number in plan["other"] else 1
            settings = Settings(url=plan["url"], pool="p", budget_ms=2_000)
            self.hooks = Scheduling(PluginSettings(settings, engine="e", form="gather", every=every))

    def _loads(self) -> Any:
        held = self.held * TOKENS
        return SimpleNamespace(
            num_total_tokens=held, num_used_tokens=held, max_total_num_tokens=10**6, num_waiting_reqs=0
        )

    def round(self, requests: list[str]) -> None:
        """One round of SGLang's loop."""
        import torch
        import torch.distributed as dist

        self.held += len(requests)
        messages = [SimpleNamespace(rid=rid, input_ids=[0] * TOKENS) for rid in requests]
        if self.hooks:
            self.hooks.received(None, self.scheduler, messages)
        mine = torch.tensor([len(requests)])
        everybodys = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, mine, group=self.scheduler.tp_cpu_group)
        info = SimpleNamespace(global_num_tokens=[int(sizes) for sizes in everybodys], num_dp_ranks=self.ranks)
        if not self.hooks:
            return
        self.hooks.synced(None, info, device="cpu", group=self.scheduler.tp_cpu_group)
        if max(info.global_num_tokens):
            self.hooks.stepped(None, self.scheduler, object(), object())
        else:
            self.hooks.idle(self.scheduler)


def serve(plan: dict[str, Any], number: int) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = plan["interface"]
    dist.init_process_group("gloo", init_method=plan["meeting"], rank=number, world_size=plan["world"])
    process = Process(plan, number)
    scheduling.IDLE_REPORT_S = 0.0
    scheduling.not_applied = lambda targets: []
    for _ in range(4):  # as many as the agreement takes
        process.round([])
    while plan["begin"] and not sum_of(int(os.path.exists(plan["begin"]))):
        process.round([])
        time.sleep(0.002)
    mine = plan["requests"].get(str(number // plan["attn_tp"]), [])  # all processes of a rank see its requests
    for start in range(0, max(map(len, plan["requests"].values())), plan["at_once"]):
        process.round(mine[start : start + plan["at_once"]])
    while True:
        process.round([])
        time.sleep(0.002)
        if sum_of(int(os.path.exists(plan["end"]))):
            break
    hook = process.hooks and process.hooks._hook
    is_gathering = bool(process.hooks and process.hooks._is_gathering)
    troubles = dict(process.hooks._trouble.counts) if process.hooks else {}
    line = {"number": number, "hook": bool(hook), "gathers": is_gathering, "troubles": troubles}
    os.write(1, (json.dumps(line) + "\n").encode())


def sum_of(value: int) -> int:
    """Everybody's values added up: all processes leave the loop in the same round."""
    import torch
    import torch.distributed as dist

    mine = torch.tensor([value])
    dist.all_reduce(mine)
    return int(mine)


def main() -> None:
    plan = json.loads(sys.argv[1])
    import torch.distributed  # noqa: F401 - here once, and not in every process after the fork

    pids = []
    for number in plan["mine"]:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                serve(plan, number)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids))


if __name__ == "__main__":
    main()
