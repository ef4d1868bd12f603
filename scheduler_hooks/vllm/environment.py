"""What this plugin takes from its surroundings: the engine's name, its own switch, vLLM's log.

DP_BALANCER_DISPATCH     1: API servers choose ranks by the pool (default 0: vLLM's own balancer does)
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping, Sequence

from balancer.model import MAX_NAME_BYTES, as_name

OURS = ("scheduler_hooks", "balancer")
_PORT_OF_SERVE = "8000"


def default_engine(arguments: Sequence[str]) -> str:
    """HOST-PORT of `vllm serve`, by its command line; HOST-PID where that does not tell the port."""
    host = as_name(socket.gethostname()) or "host"
    return f"{host[: MAX_NAME_BYTES - 12]}-{_port(arguments) or os.getpid()}"


def _port(arguments: Sequence[str]) -> str | None:
    if "serve" not in arguments or any(word.startswith(("--config", "--uds")) for word in arguments):
        return None
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--port":
            value = value if equals else "".join(arguments[at + 1 : at + 2])
            return value if value.isdecimal() else None
    return _PORT_OF_SERVE


def agree_on_engine(environment: MutableMapping[str, str], arguments: Sequence[str]) -> str:
    """The engine's name, the same in every process of one `vllm serve`.

    The first process that asks (the parent of API servers and EngineCores) writes it into its environment, which its
    children inherit. Nodes of one deployment share no environment: there DP_BALANCER_ENGINE is to be set on each.
    """
    if not environment.get("DP_BALANCER_ENGINE"):  # set but empty is not set, as everywhere
        environment["DP_BALANCER_ENGINE"] = default_engine(arguments)
    return environment["DP_BALANCER_ENGINE"]


def log_as_vllm() -> None:
    """Let this project's loggers write where vLLM's do, which is nowhere else than in its own logger's handlers.

    Whoever has configured our loggers already is left alone.
    """
    vllm = logging.getLogger("vllm")
    for name in OURS:
        ours = logging.getLogger(name)
        if vllm.handlers and not ours.handlers and ours.level == logging.NOTSET:
            ours.handlers = list(vllm.handlers)
            ours.setLevel(vllm.level)
            ours.propagate = False
