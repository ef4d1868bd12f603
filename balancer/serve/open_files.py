"""Open files: what the system lets this process have, and how many clients fit into it.

A request under way holds two, its client's connection and its engine's. A process that runs out of them resets clients
and finds engines and Redis dead that are well, so the limit is raised as far as it may be, and clients are counted.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import replace

from balancer.errors import InvalidInput
from balancer.serve.options import Limits

log = logging.getLogger("balancer.serve")

_RESERVE = 64
"""Redis, the listener, logs, metrics, looks at engines."""
_EACH_ENGINE = 4
"""Its look, its line to Redis, and connections that it has kept while others are used."""


def fitted(limits: Limits, engines: int) -> Limits:
    """The limits with as many connections as open files allow, once the soft limit is raised; raises `InvalidInput`
    where they allow none."""
    reserve = _RESERVE + _EACH_ENGINE * engines
    wanted = 2 * limits.connections + reserve
    soft = _raised(wanted)
    if soft >= wanted:
        return limits
    fits = (soft - reserve) // 2
    if fits < 1:
        raise InvalidInput(f"{soft} open files are too few to serve (ulimit -n): at least {reserve + 2} are wanted")
    log.warning("%d open files (ulimit -n) allow %d client connections, not %d", soft, fits, limits.connections)
    return replace(limits, connections=fits)


def _raised(wanted: int) -> int:
    """The soft limit, raised to what is wanted or to what is allowed."""
    soft, hard = (
        wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft >= wanted:
        return soft
    soft = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return soft
