"""A dispatcher in a container that books what it is told and sends nothing, so that what Redis keeps can be counted."""

from __future__ import annotations

import json

from tests.integration.stack import Stack

BOOK = """
import json, sys
from balancer import Dispatcher, NoRank
dispatcher = Dispatcher.connect(budget_ms=2_000)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["release"]:
        print(json.dumps(dispatcher.release(*order["release"])), flush=True)
    else:
        placed = []
        for request_id, tokens in order["book"]:
            try:
                placement = dispatcher.dispatch(request_id, tokens)
                placed.append([request_id, placement.rank, placement.outcome.value])
            except NoRank as none:
                placed.append([request_id, "", none.reason.value])
        print(json.dumps(placed), flush=True)
"""
"""A dispatcher that books what it is told and sends nothing; of any release since the first."""

Placed = list[tuple[str, str, str]]


class Booker:
    """A process in a dispatcher's container that books and releases."""

    def __init__(self, stack: Stack, container: str) -> None:
        self.process = stack.python(container, BOOK)
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def order(self, book: list[tuple[str, int]] | None = None, release: list[str] | None = None) -> None:
        """Tell it what to do; does not wait."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"book": book or [], "release": release or []}) + "\n")
        self.process.stdin.flush()

    def placed(self) -> Placed:
        """Request id, rank and outcome of each request of the order; where it got none, no rank and the reason."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return [tuple(answer) for answer in json.loads(line)]

    def released(self) -> int:
        """How many bookings the order has ended."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
