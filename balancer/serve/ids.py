"""The ids that a replica makes: of a request that came without one, and of each booking."""

from __future__ import annotations

import random


def new_id() -> str:
    """An id for a request that has none."""
    return f"req-{random.getrandbits(64):016x}"


def booking_id(own: str | None) -> str:
    """What a request is booked under, made of the client's own id where it gave one: two clients may send the same."""
    return f"{own}.{random.getrandbits(32):08x}" if own else new_id()
