"""SGLang: its requests placed by the pool, its ranks' loads reported to it. A plugin of unmodified SGLang.

    pip install .                                 # dp-balancer's folder, into SGLang's environment
    DP_BALANCER_URL=redis://10.0.0.5:6379/0 python -m sglang.launch_server ... --dp 8 --enable-dp-attention

    register     the entry point `dp_balancer` in `sglang.srt.plugins`: looks at this SGLang and attaches
    targets      what of SGLang is hooked, and which parameters the hooks count on
    dispatching  in the controller: a rank for each request
    joined       whether every rank is in the pool, before the pool places any
    tally        how many requests the pool placed and how many SGLang
    scheduling   in each scheduler: what it has received and holds, reported by its rank's leader or gathered
    counting     what a scheduler holds, read off its own objects
    agreement    whether all processes of a group take part in the gather, before any of them enters it
    identity     who this engine is in the pool
    shim         SGLang 0.5.13 to 0.5.21 load no plugins in the controller; this does

Nothing here imports SGLang before SGLang has called `register`.
"""

from scheduler_hooks.sglang.register import register

__all__ = ["register"]
