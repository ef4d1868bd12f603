"""`balancer demo`: the main job. It lives with the hooks, which nothing here imports."""

from balancer.cli.verb import verb_of

VERB = verb_of(
    "scheduler_hooks.demo.__main__",
    name="demo",
    summary="the main job: a mock engine, several dispatchers, one table",
    examples=("balancer demo", "balancer demo --quick"),
)
