"""The in-flight id inside a request id that an engine rewrites.

vLLM makes `cmpl-<X-Request-Id>-0-86f184e6` of the id that it is sent, so a dispatcher in front of it appends a mark to
the id, and the hook in the engine looks for the mark in whatever has become of it. An id without a mark is taken whole.
"""

from __future__ import annotations

import re

from balancer.model import in_flight_id

_MARK = re.compile(r"~([0-9a-f]{16})~")


def marked(request_id: str) -> str:
    """`request_id` with its in-flight id appended: `req-1~1f0c…16 hex digits…~`; for an engine that rewrites ids."""
    return f"{request_id}~{in_flight_id(request_id):016x}~"


def received_id(engines_id: str) -> int:
    """The in-flight id that an engine's own request id stands for: by its mark, else by all of it."""
    found = _MARK.search(engines_id)
    return int(found[1], 16) & (2**63 - 1) if found else in_flight_id(engines_id)


def received_ids(engines_id: str) -> tuple[int, ...]:
    """The in-flight ids under which a request of this id may be booked: by its mark first, then by all of it.

    A dispatcher outside books the marked id, one inside the engine books the engine's own id, mark or not. They are
    bookings of one request: its tokens are told with the first id, none with the other.
    """
    first, whole = received_id(engines_id), in_flight_id(engines_id)
    return (first,) if first == whole else (first, whole)
