"""Processes with the real hook, joined by gloo, that step as a test tells them; run by `test_gather`.

    python gather_ranks.py '{"url": …, "form": "gather", "processes": [{"rank_index": 0}, {"rank_index": null}], …}'

A line of JSON on stdin is an order to all processes: {"do": "step", "times": 3, "given": {"0": [holding tokens,
requests, {id: tokens}]}} (by process; the ids come with the first of the steps) or {"do": "close"}. At the end of
stdin they end. Each prints lines of JSON: {"process": 0, "pid": …} when its hook stands, {"process": 0, "error": …}
when it cannot be made, its counters after a close. torch is imported once, before the fork.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from balancer import BalancerError, Settings
from scheduler_hooks import StepHook
from scheduler_hooks.publisher import Publisher

POOL = "p"
ENGINE = "e"


def say(**words: object) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())


def build(plan: dict[str, Any], process: int) -> StepHook:
    settings = Settings(url=plan["url"], pool=POOL)
    options = plan["hook"] | plan["processes"][process]
    if plan["form"] == "leader":
        return StepHook.leading(settings, engine=ENGINE, **options)
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    count = len(plan["processes"])
    dist.init_process_group("gloo", init_method=f"file://{plan['meeting']}", rank=process, world_size=count)
    return StepHook.gathering(settings, engine=ENGINE, **options)


def serve(plan: dict[str, Any], process: int, orders: int) -> None:
    try:
        hook = build(plan, process)
    except BalancerError as error:
        say(process=process, error=f"{type(error).__name__}: {error}")
        return
    say(process=process, pid=os.getpid())
    with os.fdopen(orders, encoding="utf-8") as lines:
        for line in lines:
            order = json.loads(line)
            if order["do"] == "close":
                hook.close()
                counters = hook.publisher.counters if isinstance(hook.publisher, Publisher) else None
                say(process=process, published=counters and counters.published, waiting=hook.waiting_ids)
                continue
            holding_tokens, requests, received = order["given"].get(str(process), (0, 0, {}))
            for _ in range(order["times"]):
                hook.after_step(holding_tokens, requests, {int(id_): tokens for id_, tokens in received.items()})
                received = {}
    hook.close()


def main() -> None:
    plan = json.loads(sys.argv[1])
    if plan["form"] == "gather":
        import torch.distributed  # noqa: F401 - here once, and not in every process after the fork
    pids: list[int] = []
    writers: list[int] = []
    for process in range(len(plan["processes"])):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for other in (*writers, writer):
                    os.close(other)
                serve(plan, process, reader)
                code = 0
            finally:
                os._exit(code)
        os.close(reader)
        pids.append(pid)
        writers.append(writer)
    for line in sys.stdin.buffer:
        for writer in writers:
            try:
                _write_all(writer, line)
            except BrokenPipeError:  # a test has killed it
                continue
    for writer in writers:
        os.close(writer)
    for pid in pids:
        os.waitpid(pid, 0)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
