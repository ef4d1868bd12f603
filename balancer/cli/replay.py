"""`balancer replay`: policies live on a mock engine. It lives with the hooks, which nothing here imports."""

from balancer.cli.verb import verb_of

VERB = verb_of(
    "scheduler_hooks.replay.__main__",
    name="replay",
    summary="policies live on a mock engine, the simulator beside them",
    examples=("balancer replay", "balancer replay --requests 60 --rounds 1 --policy minimum_tokens --ranks 4"),
)
