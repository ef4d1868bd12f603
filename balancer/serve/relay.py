"""The pieces of an answer on their way from the engine's socket to the client's: written at once, counted.

This runs once for each piece, for each token of a stream: it makes no object and calls nothing that it need not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from balancer.serve.access_log import Entry
from balancer.serve.bookings import Open

if TYPE_CHECKING:
    from collections import deque

    from balancer.serve.front import Client

LAST_PIECES = 4
"""Pieces in which an answer's usage is looked for: the usage, [DONE] and the last chunk may come apart."""
_TAIL = 4096
_USAGE = re.compile(rb'"(?:prompt_tokens|input_tokens)":\s*(\d+)')
_EVENT = b"data:"


def sink(
    client: Client, entry: Entry, counted: Open | None, last: deque[bytes], head: bytes = b""
) -> Callable[[bytes], None]:
    """What takes the pieces for `client`. `head` goes out with the first; each event adds a token to `counted`."""
    write, is_closing, keep = client.transport.write, client.transport.is_closing, last.append

    def take(data: bytes) -> None:
        nonlocal head
        if is_closing():  # the client has gone in this loop turn: uvloop would raise
            return
        if head:
            write(head + data)
            client.begun, head = True, b""
        else:
            write(data)
        entry.sent_bytes += len(data)
        keep(data)
        if counted is not None:
            counted.tokens += data.count(_EVENT)

    return take


def prompt_tokens(last: Iterable[bytes]) -> int:
    """The engine's own count of the prompt, from the end of its answer; 0 where it does not tell."""
    found = _USAGE.search(b"".join(last)[-_TAIL:])
    return int(found[1]) if found else 0
