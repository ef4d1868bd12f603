"""`balancer simulate`: policies on simulated engines. The simulator is a room of its own."""

from balancer.cli.verb import verb_of

VERB = verb_of(
    "balancer.simulator.__main__",
    name="simulate",
    summary="what a policy is worth on your traffic, on simulated engines",
    examples=("balancer simulate", "balancer simulate --requests 2000 --seeds 1"),
)
