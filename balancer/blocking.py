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
    with an error, and `is_farewell` says which of these mean that the node is not to be asked again.
    """

    def __init__(
        self, new: Callable[[], Any], error_reply: type[Exception], is_farewell: Callable[[Exception], bool]
    ) -> None:
        self._new, self._error_reply, self._is_farewell = new, error_reply, is_farewell
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def execute_command(self, *words: str | int) -> Any:
        """One command and its reply; raises the node's errors, and the driver's where there is no answer."""
        link = self._taken()
        is_kept = False
        try:
            link.send_command(*words, check_health=False)
            reply = link.read_response()
            is_kept = True
        except self._error_reply as error:
            is_kept = not self._is_farewell(error)
            raise
        finally:
            if is_kept:
                self._idle.append(link)
            else:  # what may still come on it is nobody's reply, and the idle ones lead where it led
                link.disconnect()
                self.close()
        return reply

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        with suppress(IndexError):  # none is left, for others take them too
            while True:
                self._idle.pop().disconnect()

    def _taken(self) -> Any:
        if self._pid != os.getpid():
            self._idle, self._pid = [], os.getpid()
        with suppress(IndexError):  # none is idle
            link = self._idle.pop()
            with suppress(Exception):  # as good as closed
                if not link.can_read():
                    return link
            link.disconnect()  # the node has closed it, or says what nobody has asked for
        link = self._new()
        link.connect()
        return link
