"""Connections to a node for threads: one of the driver's for each command under way, kept for the next.

The driver's own client takes as long again around a command, most of it with the interpreter's lock held, for which an
engine's step waits. (Event loops have one connection for all: `pipeline`.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class BlockingClient:
    """The client of one node. Shared between threads, and across fork: a child opens its own connections.

    `new` makes a connection of the driver's, not yet connected; `error_reply` is what one raises where the node answers
    with an error.
    """

    def __init__(self, new: Callable[[], Any], error_reply: type[Exception]) -> None:
        self._new, self._error_reply = new, error_reply
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def execute_command(self, *words: str | int) -> Any:
        """One command and its reply; raises the node's errors, and the driver's where there is no answer."""
        link = self._taken()
        is_answered = False
        try:
            link.send_command(*words, check_health=False)
            reply = link.read_response()
            is_answered = True
        except self._error_reply:
            is_answered = True
            raise
        finally:
            if is_answered:
                self._idle.append(link)
            else:  # what may still come on it is nobody's reply
                link.disconnect()
        return reply

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        while self._idle:
            self._idle.pop().disconnect()

    def _taken(self) -> Any:
        if self._pid != os.getpid():
            self._pid, self._idle = os.getpid(), []
        with suppress(IndexError):  # none is idle
            link = self._idle.pop()
            with suppress(Exception):  # as good as closed
                if not link.can_read():
                    return link
            link.disconnect()  # the node has closed it, or says what nobody has asked for
        link = self._new()
        link.connect()
        return link
