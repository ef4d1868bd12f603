"""The plugin for vLLM: every EngineCore reports its rank, and, where asked to, every API server dispatches by the pool.

vLLM calls `register` in each of its processes (entry point `dp_balancer` in the group `vllm.general_plugins`); without
DP_BALANCER_URL it does nothing. vLLM is imported when `register` runs, not before.

    attach       feature detection, and the wraps: the scheduler's class, the client's add_request_async
    scheduler    what every scheduler class gets: acknowledgements and counts    counts       the counts, kept per step
    pending      of these counts, what no step has taken up yet
    dispatching  the dispatcher inside an API server                             environment  names, logs, switches
    registering  what an API server must forget again when a client goes while the dispatcher asks the pool
"""

from scheduler_hooks.vllm.attach import register

__all__ = ["register"]
