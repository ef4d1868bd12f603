"""The ranks' process group: gloo over loopback, for the hook to gather on.

The one module of the mock that imports torch, and only when a hook gathers: it stands for the group that a real engine
has anyway. The mock's own steps do not go through it (`barrier` says why).
"""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

_JOIN_SECONDS = 60.0


def import_early() -> None:
    """Import torch before the fork: seconds once, not once per rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nobody here needs it
        import torch.distributed

    torch.set_num_threads(1)


def join_ranks(rank: int, ranks: int, store: socket.socket) -> Any:
    """Join the ranks and return their process group; waits for all of them, 60 s at most (then RuntimeError).

    `store` is a listening socket made before the fork: rank 0 answers on it, so no port is guessed and no file
    is left.
    """
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    host, port = store.getsockname()
    meeting = dist.TCPStore(
        host,
        port,
        ranks,
        is_master=rank == 0,
        timeout=timedelta(seconds=_JOIN_SECONDS),
        master_listen_fd=store.detach() if rank == 0 else None,
    )
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
    return dist.group.WORLD


def _loopback_interface() -> str:
    """`lo` or `lo0`; gloo would look up the host's name otherwise, which need not resolve."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
