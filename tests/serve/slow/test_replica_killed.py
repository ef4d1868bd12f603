"""kill -9 of one of three replicas under load: only its own open requests fail, and nothing of them stays booked."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from balancer import PoolAdmin
from tests.serve.engine import Engine
from tests.serve.replica import Replica

BOOKING_LEASE_MS = 3_000
CLIENTS = 5


class Clients(threading.Thread):
    """One client of one replica: streams, one after the other, until told to stop; keeps when each ended, and how."""

    def __init__(self, replica: Replica, stop: threading.Event, number: int) -> None:
        super().__init__(daemon=True)
        self.ends: list[tuple[float, bool]] = []
        self._replica, self._stopped, self._number = replica, stop, number
        self.start()

    def run(self) -> None:
        for turn in itertools.count():
            if self._stopped.is_set():
                return
            ok = self._one(turn)
            self.ends.append((time.monotonic(), ok))
            if not ok:
                self._stopped.wait(0.05)

    def _one(self, turn: int) -> bool:
        connection = self._replica.connect(timeout_s=60)
        document = {"messages": [{"role": "user", "content": "x" * (turn % 7) * 100}], "stream": True, "max_tokens": 20}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(document))
            answer = connection.getresponse()
            return answer.status == 200 and answer.read().endswith(b"data: [DONE]\n\n")
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def test_kill_9_of_one_replica_fails_its_own_open_requests_and_no_others(
    engines: Callable[..., Engine],
    serve: Callable[..., Replica],
    admin: PoolAdmin,
    booked: Callable[[], dict[str, Any]],
    nothing_booked: Callable[[], None],
    eventually: Callable[..., None],
) -> None:
    admin.configure(booking_lease_ms=BOOKING_LEASE_MS)
    cast = [engines(pace_s=0.02) for _ in range(4)]
    replicas = [serve(*(engine.url for engine in cast)) for _ in range(3)]
    stop = threading.Event()
    clients = [[Clients(replica, stop, number) for number in range(CLIENTS)] for replica in replicas]
    eventually(lambda: all(len(c.ends) >= 3 for row in clients for c in row), "load runs everywhere", within_s=60)
    # When one is killed in the midst of its streams
    eventually(lambda: booked()["bookings"] >= 3, "requests are open")
    killed_at = time.monotonic()
    replicas[0].kill()
    survivors = [client for row in clients[1:] for client in row]
    after = [len(client.ends) for client in survivors]
    eventually(
        lambda: all(len(c.ends) >= before + 8 for c, before in zip(survivors, after, strict=True)),
        "the others go on",
        within_s=120,
    )
    stop.set()
    for client in itertools.chain(*clients):
        client.join(60)
    # Then nothing failed at the others, and no client of theirs waited longer than before
    assert all(ok for client in survivors for _, ok in client.ends)
    assert all(ok for client in clients[0] for at, ok in client.ends if at < killed_at), "nor here before"
    pauses = [
        max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(client.ends)) for client in survivors
    ]
    calm = [
        max((b - a for (a, _), (b, _) in itertools.pairwise(client.ends) if b < killed_at), default=0.0)
        for client in survivors
    ]
    print(f"\n    longest request at the others: {max(pauses):.2f} s in all, {max(calm):.2f} s before the kill")
    assert max(pauses) < max(4 * max(calm), 5.0)
    # And its requests at the engines end with it, its bookings with their lease
    eventually(lambda: all(engine.open == 0 for engine in cast), "the engines have nothing open")
    nothing_booked()
    print(f"    nothing in flight {time.monotonic() - killed_at:.1f} s after the kill (lease {BOOKING_LEASE_MS} ms)")
