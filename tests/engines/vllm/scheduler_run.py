"""vLLM's real scheduler in this process, with the hook that the plugin attaches to it; run by vLLM's own Python.

    python scheduler_run.py play MODEL SEED STEPS FORM     random traffic: are all hand-overs right?
    python scheduler_run.py cost MODEL LIVE STEPS          what the hook adds to a step, in us

Prints one line of JSON. Execution is replaced by random tokens, and by nothing else: admission, chunked prefill,
preemption, asynchronous scheduling, speculative decoding, sessions and aborts are vLLM's.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections import Counter, deque
from typing import Any

from audit import own_sums
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from balancer.marker import received_id
from scheduler_hooks.step_hook import StepHook

BLOCK = 16
HASHER: list[Any] = []


def make_scheduler(
    model: str, blocks: int, max_num_seqs: int, drafts: int = 0, run_ahead: bool = False, fetches: bool = False
) -> Any:
    """The scheduler that an EngineCore would make from these arguments, by the class that the plugin gives it."""
    more: dict[str, Any] = {}
    if drafts:
        more["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    if fetches:
        more["kv_transfer_config"] = KVTransferConfig(
            kv_connector="Fetcher", kv_connector_module_path="fetcher", kv_role="kv_both"
        )
    # Making the arguments loads the general plugins, ours among them, as in every process of vLLM.
    config = EngineArgs(
        model=model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(2048, max_num_seqs),
        max_model_len=8192,
        block_size=BLOCK,
        enforce_eager=True,
        **more,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.scheduler_config.async_scheduling = run_ahead
    if not HASHER:
        from vllm.utils.hashing import sha256

        init_none_hash(sha256)
        HASHER.append(get_request_block_hasher(BLOCK, sha256))
    import torch

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    caches = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=caches,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        include_finished_set=True,
        log_stats=True,
    )


def request(request_id: str, prompt: list[int], max_tokens: int, **more: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=more.pop("extra_args", None))
    return Request(request_id, prompt, params, None, block_hasher=HASHER[0], **more)


def answer(scheduler: Any, planned: Any, dice: random.Random) -> ModelRunnerOutput:
    """What a device could have answered: a token for each complete request, and some of its drafts accepted."""
    ids = list(planned.num_scheduled_tokens)
    sampled = []
    for request_id in ids:
        live = scheduler.requests.get(request_id)
        if live is None or planned.is_chunk[request_id]:
            sampled.append([])
        else:
            drafts = len(planned.scheduled_spec_decode_tokens.get(request_id, ()))
            sampled.append([dice.randrange(16, 200) for _ in range(1 + dice.randint(0, drafts))])
    output = ModelRunnerOutput(ids, {id_: at for at, id_ in enumerate(ids)}, sampled)
    if scheduler.connector is not None:
        output.kv_connector_output = KVConnectorOutput(finished_recving=scheduler.connector.come(dice))
    return output


class Watch:
    """Compares every hand-over with the scheduler's own sum, and remembers which ids were acknowledged."""

    def __init__(self) -> None:
        self.hand_overs, self.wrong = 0, []
        self.most_pending = self.most_kv = 0
        self.received: set[int] = set()
        self.scheduler: Any = None
        after_step = StepHook.after_step

        def watched(hook: StepHook, *said: Any) -> None:
            after_step(hook, *said)
            tokens, requests, received, *known = said
            self.hand_overs += 1
            self.received |= set(received)
            own = own_sums(self.scheduler)
            self.most_pending = max(self.most_pending, own[2])
            self.most_kv = max(self.most_kv, own[3])
            if (tokens, requests, *known) != own:
                self.wrong.append([self.hand_overs, tokens, requests, *known, *own])

        StepHook.after_step = watched  # type: ignore[method-assign]


def step(scheduler: Any, ahead: deque[Any], dice: random.Random, depth: int, drafts: int) -> None:
    """One turn of an EngineCore's loop; with depth 2 the next batch is planned before the last one is answered."""
    if scheduler.has_requests():
        planned = scheduler.schedule()
        planned.is_chunk = {
            id_: scheduler.requests[id_].is_prefill_chunk
            for id_ in planned.num_scheduled_tokens
            if id_ in scheduler.requests
        }
        ahead.append(planned)
    if ahead and (len(ahead) >= depth or not scheduler.has_requests()):
        planned = ahead.popleft()
        scheduler.update_from_output(planned, answer(scheduler, planned, dice))
        if drafts and depth == 1:
            ids = [live.request_id for live in scheduler.running]
            scheduler.update_draft_token_ids(
                DraftTokenIds(ids, [[dice.randrange(16, 200) for _ in range(drafts)] for _ in ids])
            )


def play(model: str, seed: int, steps: int, form: str) -> dict[str, Any]:
    """Random traffic on a KV cache that is too small for it, then all of it ended."""
    dice = random.Random(seed)
    drafts, run_ahead = 3 * ("drafts" in form), "ahead" in form
    watch = Watch()
    scheduler = watch.scheduler = make_scheduler(model, 300, 32, drafts, run_ahead, form == "fetches")
    counts, ahead, sent, seen = scheduler._dp_balancer, deque(), [], Counter()
    number = 0
    for _ in range(steps):
        for _ in range(dice.choice([0, 0, 1, 1, 2, 5])):
            number += 1
            id_ = f"cmpl-{number}-0-{dice.randrange(2**32):08x}"
            prompt = [dice.randrange(16, 200) for _ in range(dice.choice([1, 3, 40, 200, 900]))]
            session = form == "sessions" and dice.random() < 0.3
            scheduler.add_request(request(id_, prompt, dice.choice([1, 5, 30, 120]), resumable=session))
            sent.append(id_)
            seen["sessions"] += session
        if scheduler.requests and dice.random() < 0.2:
            some = dice.sample(sorted(scheduler.requests), min(len(scheduler.requests), dice.choice([1, 1, 3])))
            scheduler.finish_requests([*some, "a-stranger"], RequestStatus.FINISHED_ABORTED)
            seen["aborts"] += len(some)
        if form == "sessions" and (waiting := [r for r in scheduler.requests.values() if r.resumable]):
            live = dice.choice(waiting)
            scheduler.add_request(
                request(live.request_id, [17] * dice.choice([1, 60]), 10, resumable=dice.random() < 0.8)
            )
            seen["session inputs"] += 1
        keeps_blocks = form in ("sessions", "fetches")  # one that waits, for its client or its KV
        if not keeps_blocks and dice.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=not ahead)
        step(scheduler, ahead, dice, 2 if run_ahead else 1, drafts)
        seen["fetching"] += any(
            live.status == RequestStatus.WAITING_FOR_REMOTE_KVS for live in scheduler.requests.values()
        )
        seen["preemptions"] = max(
            seen["preemptions"], sum(live.num_preemptions for live in scheduler.requests.values())
        )
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    while ahead or scheduler.has_requests():
        step(scheduler, ahead, dice, 1, 0)
    return {
        "class": [base.__name__ for base in type(scheduler).__mro__[:4]],
        "hand_overs": watch.hand_overs,
        "wrong": watch.wrong[:5],
        "requests": len(sent),
        "not_acknowledged": sum(received_id(id_) not in watch.received for id_ in sent),
        "at_the_end": [counts.held_tokens, counts.requests, counts._pending.now()],
        "most_pending_tokens": watch.most_pending,
        "most_kv_permille": watch.most_kv,
        "troubles": dict(counts.trouble.counts),
        "seen": dict(seen),
    }


def cost(model: str, live: int, steps: int) -> dict[str, Any]:
    """CPU time of the step thread in the hook, per step with `live` requests: what of each call is not vLLM's own."""
    inner = 0.0

    def timed(name: str) -> None:
        method = getattr(Scheduler, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inner
            start = time.thread_time()
            try:
                return method(self, *args, **kwargs)
            finally:
                inner += time.thread_time() - start

        setattr(Scheduler, name, call)

    for name in ("schedule", "update_from_output"):
        timed(name)
    dice = random.Random(1)
    # Prompts small enough that all are admitted at once, and a cache that holds them.
    scheduler = make_scheduler(model, 64 + live * 14, live)
    for number in range(live):
        scheduler.add_request(request(f"cmpl-{number}-0-00000000", [17] * 100, 8_000))
    while any(r.is_prefill_chunk or not r.num_output_tokens for r in scheduler.requests.values()):
        step(scheduler, deque(), dice, 1, 0)
    hook_us, step_ms = [], []
    others_s = time.process_time() - time.thread_time()
    for _ in range(steps):
        inner = 0.0
        start = time.thread_time()
        planned = scheduler.schedule()
        planned_s = time.thread_time() - start
        ids = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(ids, {id_: at for at, id_ in enumerate(ids)}, [[17]] * len(ids))
        time.sleep(0.002)  # the device computes, and the publisher's thread has its time
        start = time.thread_time()
        outputs = scheduler.update_from_output(planned, output)
        whole_s = planned_s + time.thread_time() - start
        del planned, outputs  # taking 2,000 outputs apart is nobody's cost here
        hook_us.append((whole_s - inner) * 1e6)
        step_ms.append(inner * 1e3)
        if len(scheduler.requests) < live:
            break
    others_s = time.process_time() - time.thread_time() - others_s
    hook_us.sort()
    return {
        "live": live,
        "steps": len(hook_us),
        "hook_us_p50": round(statistics.median(hook_us), 1),
        "hook_us_p99": round(hook_us[int(len(hook_us) * 0.99)], 1),
        "publisher_us_mean": round(others_s / len(hook_us) * 1e6, 1),  # of its own thread; waits for Redis are no CPU
        "vllm_ms_p50": round(statistics.median(step_ms), 3),
        "counted_exactly": scheduler._dp_balancer.held_tokens
        == sum(live.num_tokens for live in scheduler.requests.values()),
    }


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    what, model, first, second, *form = sys.argv[1:]
    said = play(model, int(first), int(second), *form) if what == "play" else cost(model, int(first), int(second))
    print(json.dumps(said))
