"""vLLM's real AsyncLLM, output processor and client, with the dispatcher inside; run by vLLM's own Python.

    python registration_run.py     clients that go, and aborts, while the pool is asked: what is left of them?

Prints one line of JSON. Neither processes nor sockets: what would be sent to an EngineCore is written down instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from balancer import AsyncDispatcher, Reporter, Settings
from scheduler_hooks.vllm import register

RANKS = 2


def make_client(sent: list[tuple[str, Any]]) -> Any:
    """A client of two EngineCores that writes down what it would send."""
    client = DPLBAsyncMPClient.__new__(DPLBAsyncMPClient)

    async def send(kind: Any, message: Any, engine: bytes) -> None:
        sent.append((kind.name, getattr(message, "request_id", message)))

    client.__dict__ |= {
        "core_engines": [bytes([rank]) for rank in range(RANKS)],
        "engine_ranks_managed": list(range(RANKS)),
        "lb_engines": [[0, 0, 0.0] for _ in range(RANKS)],
        "reqs_in_flight": {},
        "streaming_reqs": set(),
        "engine_inflight": Counter(),
        "client_count": 1,
        "client_index": 0,
        "eng_start_index": 0,
        "current_wave": 0,
        "resources": SimpleNamespace(engine_dead=False),
        "_ensure_stats_update_task": lambda: None,
        "_ensure_output_queue_task": lambda: None,
        "_send_input": send,
        "shutdown": lambda timeout=None: None,
    }
    return client


def make_llm(client: Any) -> Any:
    """An AsyncLLM with vLLM's own output processor, whose requests come tokenized."""
    llm = AsyncLLM.__new__(AsyncLLM)
    llm.__dict__ |= {
        "engine_core": client,
        "output_processor": OutputProcessor(None, log_stats=False),
        "input_processor": SimpleNamespace(
            apply_watermarking=lambda params, found: None,
            resolve_watermarking=lambda params: None,
            assign_request_id=InputProcessor.assign_request_id,
        ),
        "vllm_config": SimpleNamespace(cache_config=SimpleNamespace(kv_sharing_fast_prefill=False)),
        "scheduler_config": SimpleNamespace(max_num_queued_reqs=None, max_num_queued_tokens=None),
        "admission_stats": None,
        "model_config": None,
        "log_requests": False,
        "output_handler": SimpleNamespace(),  # it runs already, as far as vLLM looks
        "shutdown": lambda timeout=None: None,
    }
    AsyncLLM.errored = property(lambda self: False)  # type: ignore[assignment, method-assign]
    return llm


def generate(llm: Any, request_id: str, n: int) -> asyncio.Task[list[Any]]:
    """A client's request, under way."""
    params = SamplingParams(n=n, max_tokens=4, detokenize=False, output_kind=RequestOutputKind.DELTA)
    request = EngineCoreRequest(request_id, [20, 30, 40], None, params, None, 0.0, None, None, None)

    async def read() -> list[Any]:
        return [output async for output in llm.generate(request, params, request_id, prompt_text="")]

    return asyncio.ensure_future(read())


async def under_way(llm: Any) -> None:
    """Wait until vLLM has registered it, and so the pool is being asked."""
    while not llm.output_processor.request_states:
        await asyncio.sleep(0)


async def left(llm: Any, client: Any, sent: list[Any], looker: AsyncDispatcher, task: asyncio.Task[Any]) -> Any:
    """How it ended, and what is left of it everywhere."""
    done, _ = await asyncio.wait([task], timeout=20)
    end = "hangs" if not done else "cancelled" if task.cancelled() else repr(task.exception() or len(task.result()))
    for _ in range(200):
        if not (bookings := (await looker.snapshot()).bookings):
            break
        await asyncio.sleep(0.01)
    processor = llm.output_processor
    registered, in_flight = [*processor.request_states, *processor.external_req_ids], [*client.reqs_in_flight]
    return {
        "end": end,
        "registered": registered,
        "sent": sent,
        "in_flight": in_flight,
        "booked": bookings,
    }


async def story(what: str, n: int, settings: Settings) -> Any:
    """One request whose client goes, or which is aborted by its id, while the pool is asked."""
    sent: list[tuple[str, Any]] = []
    client = make_client(sent)
    llm = make_llm(client)
    async with AsyncDispatcher(settings) as looker:
        task = generate(llm, what, n)
        await under_way(llm)
        if what == "goes":
            task.cancel()
        elif what == "aborted":
            await llm.abort(what)
        if what == "stays":
            while len(sent) < n:
                await asyncio.sleep(0.01)
            await looker.release(*client.reqs_in_flight)
            told = {"sent": [kind for kind, _ in sent], "registered": len(llm.output_processor.request_states)}
            task.cancel()
            await asyncio.wait([task])
            found = told | {"aborts": [kind for kind, _ in sent].count("ABORT")}
        else:
            found = await left(llm, client, sent, looker, task)
        await client._dp_balancer.aclose()
        return found


async def main() -> None:
    settings = Settings.from_environment(None, budget_ms=2_000)
    with contextlib.closing(Reporter(settings, os.environ["DP_BALANCER_ENGINE"], RANKS)) as reporter:
        reporter.join()
        stories = [(what, n) for what in ("stays", "goes", "aborted") for n in (1, 3)]
        print(json.dumps({f"{what} {n}": await story(what, n, settings) for what, n in stories}))


if __name__ == "__main__":
    register()
    asyncio.run(main())
