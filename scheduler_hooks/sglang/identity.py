"""Who this engine is in the pool: one name on all its nodes, and the address at which dispatchers outside reach it."""

from __future__ import annotations

import socket
from typing import Any

from balancer.model import MAX_NAME_BYTES, as_name
from scheduler_hooks.plugin import PluginSettings

_ANY_HOST = ("0.0.0.0", "::", "", None)


def engine_name(plugin: PluginSettings, server_args: Any) -> str:
    """DP_BALANCER_ENGINE, else HOST-PORT; with several nodes, of the address where they meet (--dist-init-addr)."""
    if plugin.engine:
        return plugin.engine
    meeting = getattr(server_args, "dist_init_addr", None)
    if getattr(server_args, "nnodes", 1) > 1 and meeting:
        text = str(meeting)
    else:
        text = f"{socket.gethostname()}-{server_args.port}"
    return as_name(text)[-MAX_NAME_BYTES:].lstrip("._-") or "sglang"


def address(plugin: PluginSettings, server_args: Any) -> str:
    """DP_BALANCER_ADDRESS, else host and port of the server, by this machine's name where it listens on all of them.

    Of several nodes only the first one answers requests: its host is the one where they meet (--dist-init-addr).
    """
    if plugin.address:
        return plugin.address
    meeting = getattr(server_args, "dist_init_addr", None)
    if getattr(server_args, "nnodes", 1) > 1 and meeting:
        return f"{str(meeting).rpartition(':')[0]}:{server_args.port}"
    host = getattr(server_args, "host", None)
    return f"{socket.gethostname() if host in _ANY_HOST else host}:{server_args.port}"
