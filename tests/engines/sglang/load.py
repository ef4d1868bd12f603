"""Requests that keep coming: what was answered, by which rank, how long it took, what failed."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.engines.sglang.server import SGLangServer


@dataclass
class Load:
    """`streams` requests at a time to a server, one after the other, until the end of the `with`."""

    server: SGLangServer
    streams: int = 4
    new_tokens: int = 8
    seed: int = 1
    answered: list[tuple[int, float]] = field(default_factory=list)
    """DP rank and seconds of each answer."""
    failed: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for stream in range(self.streams):
            thread = threading.Thread(target=self._run, args=(random.Random(self.seed * 100 + stream),), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(180)

    def after(self, answers: int, within_s: float = 180) -> None:
        """Wait for so many more answers."""
        target, deadline = len(self.answered) + answers, time.monotonic() + within_s
        while len(self.answered) < target and not self.failed:
            assert time.monotonic() < deadline, f"{answers} answers within {within_s} s"
            time.sleep(0.02)

    def _run(self, rng: random.Random) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                answer: Any = self.server.generate(rng.choice((4, 20, 60, 150)), self.new_tokens)
                self.answered.append((answer["meta_info"]["dp_rank"], time.monotonic() - began))
            except Exception as error:
                self.failed.append(repr(error))
                return
