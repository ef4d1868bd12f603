"""A pool to measure on: one engine with its counts, commands ready to send, and the server's own clock per command.

Commands are encoded before the clock starts and sent by a bare socket, so that a client's cost is not in the numbers.
"""

from __future__ import annotations

import random
import socket
import uuid
from collections.abc import Sequence
from typing import Any

import redis

from balancer import Incarnation, RankCounts, Request, protocol
from balancer.embedded import EmbeddedRedis
from balancer.keys import KEY_NAMES, pool_keys
from balancer.model import MAX_REQUESTS_PER_DISPATCH, Report, Scope
from balancer.protocol import ANYWHERE, Operation
from balancer.scripts import load_script

Word = str | int
Command = tuple[Word, ...]

DISPATCHER = "router-7d9f8b6c4d-x2x9q-12"
"""A dispatcher's default name, HOST-PID, where the host is a pod."""

AT_ONCE = 32
"""Commands under way at a time, as from 32 connections."""

FIRST_ID = 3 + len(KEY_NAMES) + 2
"""Where in a dispatch's command the first id stands, after EVALSHA, the keys, the dispatcher and want_loads."""

_NEVER_MS = 7 * 24 * 3_600_000
_END = b"$3\r\nEND\r\n"


class BenchPool:
    """A pool of one engine with `ranks` ranks that hold different numbers of tokens, and leases that do not end.

    `others`: engines of as many ranks beside it.
    """

    def __init__(
        self, server: EmbeddedRedis, ranks: int, name: str = "bench", policy: str = "minimum_tokens", others: int = 0
    ) -> None:
        self.name, self.ranks, self.port, self.keys = name, ranks, server.port, pool_keys(name)
        self.redis = redis.Redis.from_url(server.url, protocol=2, socket_timeout=60)
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._random = random.Random(7)
        self.redis.delete(*self.keys)
        leases = {"engine_lease_ms": _NEVER_MS, "booking_lease_ms": _NEVER_MS, "forget_ms": _NEVER_MS}
        self.run(protocol.configure(name, {"policy": policy, **leases}))
        self._step = 0
        for other in range(1, 1 + others):
            self._begin(f"sglang-{other}")
        self.reset()

    def reset(self) -> None:
        """Nothing in flight, by a new life of the engine; its ranks hold 10,000 to 200,000 tokens."""
        self.redis.unlink(*(self.keys[at] for at in (8, 9)))  # bookings, deadlines
        self._begin("sglang-0")

    def _begin(self, engine: str) -> None:
        joining = Incarnation(engine, self.ranks, uuid.uuid4().hex)
        epoch = int(self.run(protocol.join(self.name, joining))[1])
        self.incarnation = Incarnation(engine, self.ranks, joining.nonce, epoch=epoch)
        self.run(self.report())

    def report(self, received: Sequence[int] = (), counts: Sequence[RankCounts] | None = None) -> Operation[Any]:
        """The engine's next report: these counts, or 10,000 to 200,000 tokens on each rank."""
        self._step += 1
        counts = counts or [RankCounts(self._random.randint(10_000, 200_000), 64) for _ in range(self.ranks)]
        return protocol.report(self.name, self.incarnation, Report(self._step, counts, received))

    def requests(self, count: int) -> list[Request]:
        """New requests: uuid4 ids, 1 to 4,000 tokens."""
        return [Request(str(uuid.uuid4()), self._random.randint(1, 4_000)) for _ in range(count)]

    def dispatch(self, requests: Sequence[Request], scope: Scope = ANYWHERE) -> Operation[Any]:
        """One dispatch of these requests."""
        return protocol.dispatch(self.name, DISPATCHER, requests, scope=scope)

    def book(self, count: int) -> list[Request]:
        """Put `count` new requests in flight, in long lists."""
        requests = self.requests(count)
        step = MAX_REQUESTS_PER_DISPATCH
        self.send([self.command(self.dispatch(requests[at : at + step])) for at in range(0, count, step)])
        return requests

    def release(self, requests: Sequence[Request]) -> None:
        """End the bookings of these requests."""
        ids = [request.request_id for request in requests]
        step = protocol.MAX_IDS_PER_RELEASE
        self.send([self.command(protocol.release(self.name, ids[at : at + step])) for at in range(0, len(ids), step)])

    def run(self, operation: Operation[Any]) -> list[bytes]:
        """Perform one operation; its raw reply."""
        reply: list[bytes] = self.redis.execute_command(*self.command(operation))  # type: ignore[no-untyped-call]
        return reply

    def command(self, operation: Operation[Any]) -> Command:
        """The operation as an EVALSHA of a script that Redis has."""
        script = load_script(operation.script)
        if not self.redis.script_exists(script.sha)[0]:
            self.redis.script_load(script.text)
        return ("EVALSHA", script.sha, len(operation.keys), *operation.keys, *operation.arguments)

    def server_us(self, commands: Sequence[Command]) -> float:
        """Server time per EVALSHA, in µs, over these commands (INFO commandstats)."""
        packed = [_packed(command) for command in commands]
        usec, calls = self._spent()
        self._send(packed)
        usec_after, calls_after = self._spent()
        assert calls_after - calls == len(commands), "somebody else talks to this server"
        return (usec_after - usec) / len(commands)

    def send(self, commands: Sequence[Command]) -> None:
        """Send the commands, AT_ONCE at a time; raises where one is answered with an error."""
        self._send([_packed(command) for command in commands])

    def close(self) -> None:
        self.redis.delete(*self.keys)
        self.redis.close()
        self._socket.close()

    def _send(self, packed: Sequence[bytes]) -> None:
        for at in range(0, len(packed), AT_ONCE):
            self._socket.sendall(b"".join(packed[at : at + AT_ONCE]) + b"*2\r\n$4\r\nECHO\r\n" + _END)
            replies = b""
            while not replies.endswith(_END):
                replies += self._socket.recv(1 << 20)
            assert b"\r\n-" not in b"\r\n" + replies, replies[:500]

    def _spent(self) -> tuple[int, int]:
        stats = self.redis.info("commandstats").get("cmdstat_evalsha", {"usec": 0, "calls": 0})
        return stats["usec"], stats["calls"]


def _packed(command: Command) -> bytes:
    words = [str(word).encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
