"""Ports of this machine that lead to a server, or only seem to: names that move, paths that are slow or die."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import redis

from balancer.store import Store


class Listener:
    """A port of this machine; each connection is served by a thread."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._taken: list[socket.socket] = []
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for each in (self._socket, *self._taken):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._taken.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(connection)


class Name(Listener):
    """A name, or a virtual address: it leads new connections to `target`; those that are open stay where they are."""

    def __init__(self, target: int, delay_s: float = 0.0) -> None:
        self.target, self.delay_s = target, delay_s
        self.connections = 0
        self._dead_until = 0
        super().__init__()

    def lose_open_paths(self) -> None:
        """What is open now delivers nothing any more, and nobody is told."""
        self._dead_until = self.connections

    def serve(self, connection: socket.socket) -> None:
        self.connections += 1
        number = self.connections
        beyond = socket.create_connection(("127.0.0.1", self.target))
        self._taken.append(beyond)
        threading.Thread(target=self._pass, args=(beyond, connection, number, True), daemon=True).start()
        self._pass(connection, beyond, number, False)

    def _pass(self, source: socket.socket, sink: socket.socket, number: int, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                time.sleep(self.delay_s * is_reply)
                if number > self._dead_until:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def named(target: int, delay_s: float = 0.0) -> Iterator[Name]:
    """A name, whose replies take so long."""
    with closing(Name(target, delay_s)) as name:
        yield name


def open_many(store: Store, client: redis.Redis, count: int) -> None:
    """Have `store` open so many connections, by as many threads at once, and keep them; `client`: a plain one."""
    threads = [threading.Thread(target=store.command, args=("BLPOP", f"gate-{at}", "20")) for at in range(count)]
    for thread in threads:
        thread.start()
    while int(client.info("clients")["blocked_clients"]) < count:
        time.sleep(0.005)
    for at in range(count):
        client.rpush(f"gate-{at}", "open")
    for thread in threads:
        thread.join()
