"""Engine-side hooks of dp-balancer: after each step, tell the pool what every rank holds and has received.

    hook = StepHook.gathering(settings, engine="e0", size=16, rank_index=dp_rank, group=tp_cpu_group)
    hook.after_step(holding_tokens, requests, received_ids)     # every rank, after every step
    hook.close()

    step_hook  the hook: what an engine's adapter calls      gather     the collective (the only importer of torch)
    forms      one report for all ranks, or each alone       row        what a rank brings to the collective
    intake     what the engine says, made safe; the carry    publisher  the thread that reports to Redis
    once       trouble is logged once and counted            mailbox    between the step thread and that thread
    sglang     the plugin for SGLang                         vllm       the plugin for vLLM
    plugin     what the two share

Importing this package does not import torch; `StepHook.gathering` does.
"""

from scheduler_hooks.publisher import Publisher, PublisherCounters
from scheduler_hooks.step_hook import StepHook

__all__ = ["Publisher", "PublisherCounters", "StepHook"]
