"""The keys of a pool: thirteen, all with the pool's hash tag, always in this order. Twin of `lua/lib/keys.lua`."""

from __future__ import annotations

from functools import cache

from balancer.model import checked_name

PREFIX = "dpb"

KEY_NAMES = (
    "pool",
    "engines",
    "leases",
    "loads",
    "holding",
    "requests",
    "in_flight",
    "in_flight_requests",
    "bookings",
    "deadlines",
    "capacity",
    "queues",
    "pressure",
)


@cache
def pool_keys(pool: str) -> tuple[str, ...]:
    """The keys of `pool`, e.g. `dpb:{chat}:holding`; raises `InvalidInput` for a name that cannot be one."""
    checked_name(pool, "pool name")
    return tuple(f"{PREFIX}:{{{pool}}}:{name}" for name in KEY_NAMES)
