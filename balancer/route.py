"""The way to the primary: which node is asked next, and what an answer teaches. Pure: no I/O, no clock, no driver.

All keys of a pool are one slot, so a pool lives on one node at a time, with Sentinel and Cluster alike. A route holds
that node for as long as it serves, and when it does not, says whom to ask: a sentinel for the primary's address, or
another node of the cluster, which names the right one (MOVED). Nothing is looked up before it is needed, nothing is
polled, and each look-up is one round trip within the budget of the operation that needs it. `store` drives it, from
several threads at once: each method is a few assignments, and a lost race costs one more look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from balancer.address import Address, Kind, Node
from balancer.errors import StoreUnavailable

MOST_KNOWN = 64
"""Most nodes of a cluster that are remembered: those of the URL, and the last others that served."""


class Route(Protocol):
    """Where a pool's primary is taken to be."""

    @property
    def primary(self) -> Node | None:
        """The node to send operations to; None where `question` must be asked first."""
        ...

    def question(self) -> tuple[Node, tuple[str, ...]]:
        """Whom to ask for the primary, and the command."""
        ...

    def answered(self, reply: Sequence[bytes | str] | None) -> None:
        """The reply to the question; raises `StoreUnavailable` where it names no primary."""
        ...

    def moved(self, node: Node) -> None:
        """`node` is said to serve the pool's slot."""
        ...

    def lost(self, node: Node) -> None:
        """`node` did not serve, be it the primary or one that was asked."""
        ...


def route_to(address: Address) -> Route:
    """The route to what `address` names."""
    if address.kind is Kind.SENTINEL:
        return _SentinelRoute(address)
    return _ClusterRoute(address) if address.kind is Kind.CLUSTER else _PlainRoute(address)


class _PlainRoute:
    """One server, for better or worse."""

    def __init__(self, address: Address) -> None:
        self.primary: Node | None = address.nodes[0]

    def question(self) -> tuple[Node, tuple[str, ...]]:
        raise AssertionError("the primary is known")

    def answered(self, reply: Sequence[bytes | str] | None) -> None:
        raise AssertionError("nothing was asked")

    def moved(self, node: Node) -> None:
        raise StoreUnavailable(f"a node of a cluster says that {node} serves this pool: use redis+cluster://")

    def lost(self, node: Node) -> None:
        pass


class _SentinelRoute:
    """The sentinels are asked in turn, beginning with the one that answered last, or after it where what it named does
    not serve: one that is cut off from the others goes on naming an old primary."""

    def __init__(self, address: Address) -> None:
        self.primary: Node | None = None
        self._sentinels = address.nodes
        self._service = address.service
        self._turn = 0

    def question(self) -> tuple[Node, tuple[str, ...]]:
        return self._sentinels[self._turn], ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)

    def answered(self, reply: Sequence[bytes | str] | None) -> None:
        if not reply:
            asked = self._sentinels[self._turn]
            self._next(asked)
            raise StoreUnavailable(f"the sentinel {asked} knows no primary called {self._service!r}")
        host, port = (part.decode() if isinstance(part, bytes) else part for part in reply)
        self.primary = Node(host, int(port))

    def moved(self, node: Node) -> None:
        raise StoreUnavailable("the sentinels' primary is a node of a cluster: use redis+cluster://")

    def lost(self, node: Node) -> None:
        if node.is_sentinel:
            self._next(node)
        elif node == self.primary:
            self.primary = None
            self._next(self._sentinels[self._turn])

    def _next(self, sentinel: Node) -> None:
        if sentinel == self._sentinels[self._turn]:
            self._turn = (self._turn + 1) % len(self._sentinels)


class _ClusterRoute:
    """Any node will do to begin with: one that does not serve the slot says who does."""

    def __init__(self, address: Address) -> None:
        self._named = address.nodes
        self._known = list(address.nodes)
        self.primary: Node | None = self._known[0]

    def question(self) -> tuple[Node, tuple[str, ...]]:
        raise AssertionError("the next node is known")

    def answered(self, reply: Sequence[bytes | str] | None) -> None:
        raise AssertionError("nothing was asked")

    def moved(self, node: Node) -> None:
        if node not in self._known:
            learned = [*self._known[len(self._named) :], node][-max(1, MOST_KNOWN - len(self._named)) :]
            self._known = [*self._named, *learned]
        self.primary = node

    def lost(self, node: Node) -> None:
        if node == self.primary:
            known = self._known
            after = known.index(node) + 1 if node in known else 0
            self.primary = known[after % len(known)]
