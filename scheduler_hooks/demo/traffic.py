"""A dispatcher that never stops: places a stream of made-up requests on mock engines, follows each to its end, logs.

`python -m scheduler_hooks.demo.traffic --rate 20` is what a dispatcher container runs (docker/compose.yml), and with
what the tests in containers put load on a pool. Redis, user, password and budget come from DP_BALANCER_* variables.
A request that gets no rank is given up, as a gateway answers 503; one whose engine goes away is lost, as its connection
is. It says `{"ready": true}` when Redis has placed a first request. Told to stop (SIGTERM, or the end of its input with
--until-eof) it asks no more, waits for what is open, and says all it counted in one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from balancer import AsyncDispatcher, BalancerError, NoRank, Outcome, Settings
from balancer.workload import TimedRequest, generate
from scheduler_hooks.demo.rank_connections import RankConnections
from scheduler_hooks.demo.tally import Tally

log = logging.getLogger("balancer.traffic")

_DRAWN_AT_ONCE = 1_000
_ALIVE_EVERY_S = 1.0
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask. `requests` or `seconds` end the stream; `patience_s` is for what is open then."""

    rate_per_s: float
    prefix: str
    requests: int | None = None
    seconds: float | None = None
    max_input_tokens: int = 8_192
    max_output_tokens: int = 200
    seed: int = 1
    patience_s: float = 30.0


def stream(plan: Plan) -> Iterator[TimedRequest]:
    """The plan's requests, for ever if need be, with rising arrival times."""
    passed_s = 0.0
    for chunk in itertools.count():
        drawn = generate(_DRAWN_AT_ONCE, plan.seed + chunk, plan.rate_per_s)
        for request in drawn:
            yield TimedRequest(
                passed_s + request.arrival_s,
                min(request.input_tokens, plan.max_input_tokens),
                min(request.output_tokens, plan.max_output_tokens),
            )
        passed_s += drawn[-1].arrival_s + 1 / plan.rate_per_s


class Traffic:
    """One dispatcher and its stream."""

    def __init__(self, plan: Plan, dispatcher: AsyncDispatcher) -> None:
        self._plan, self._dispatcher = plan, dispatcher
        self._ranks = RankConnections(dispatcher)
        self._stopped = asyncio.Event()
        self.tally = Tally()
        self.last_answer_s = time.monotonic()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    async def run(self) -> None:
        """Ask until the plan or `stop` ends it, then wait for what is open as long as the plan has patience."""
        await self._wait_for_pool()
        began_s = time.monotonic()
        serving: set[asyncio.Task[None]] = set()
        for number, request in enumerate(itertools.islice(stream(self._plan), self._plan.requests)):
            if self._plan.seconds is not None and request.arrival_s > self._plan.seconds:
                break
            if await self._is_stopped_by(began_s + request.arrival_s):
                break
            task = asyncio.create_task(self._serve(f"{self._plan.prefix}-{number}", request))
            serving.add(task)
            task.add_done_callback(serving.discard)
        if serving:
            _, late = await asyncio.wait(serving, timeout=self._plan.patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._ranks.close()

    async def _wait_for_pool(self) -> None:
        """A dispatcher that begins before its pool would have nothing to place on, and nothing to fall back on."""
        said = False
        while True:
            try:
                return await self._ranks.learn()
            except BalancerError as error:
                if not said:
                    log.warning("waits for its pool: %s", error)
                said = True
            if await self._is_stopped_by(time.monotonic() + _LOOK_EVERY_S):
                return

    async def _is_stopped_by(self, moment_s: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, moment_s - time.monotonic())):
                return await self._stopped.wait()
        except TimeoutError:
            return False

    async def _serve(self, request_id: str, request: TimedRequest) -> None:
        tally = self.tally
        tally.asked += 1
        asked_s = time.monotonic()
        try:
            placement = await self._dispatcher.dispatch(request_id, request.input_tokens)
        except BalancerError as error:
            word = "no_rank" if isinstance(error, NoRank) else "failed"
            tally.answered(word, time.monotonic() - asked_s)
            kind = error.reason.value if isinstance(error, NoRank) else type(error).__name__
            if kind not in tally.no_rank:
                log.warning("a request is given up, others like it are counted: %s", error)
            tally.no_rank[kind] += 1
            return
        finally:
            self.last_answer_s = time.monotonic()
        if placement.outcome is Outcome.PLACED and not tally.answers[Outcome.PLACED.value]:
            print(orjson.dumps({"ready": True}).decode(), flush=True)
        tally.answered(placement.outcome.value, time.monotonic() - asked_s)
        try:
            ended = await self._ranks.send(placement, request.output_tokens)
        except OSError as error:
            if not tally.ends["not_sent"]:
                log.warning("a request is not sent, others like it are counted: %s", error)
            tally.ends["not_sent"] += 1
            await self._dispatcher.release(request_id)
            return
        tally.ends[await ended] += 1


async def _say(traffic: Traffic, every_s: float, alive: Path | None) -> None:
    """Keep the log and the file by which a health check sees that dispatches are answered."""
    next_line_s = time.monotonic() + every_s
    while True:
        await asyncio.sleep(min(_ALIVE_EVERY_S, every_s))
        if alive is not None and time.monotonic() - traffic.last_answer_s < 10 * _ALIVE_EVERY_S:
            alive.touch()
        if time.monotonic() >= next_line_s:
            next_line_s += every_s
            log.info("%s", traffic.tally.line())


async def _run(plan: Plan, settings: Settings, every_s: float, alive: Path | None, until_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncDispatcher(settings) as dispatcher:
        traffic = Traffic(plan, dispatcher)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, traffic.stop)
        if until_eof:
            loop.add_reader(sys.stdin.fileno(), traffic.stop)
        saying = asyncio.create_task(_say(traffic, every_s, alive))
        try:
            await traffic.run()
        finally:
            saying.cancel()
            loop.remove_reader(sys.stdin.fileno())
    log.info("%s", traffic.tally.line())
    print(orjson.dumps(traffic.tally.as_json()).decode(), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scheduler_hooks.demo.traffic",
        description="Place a stream of made-up requests on a pool's mock engines until told to stop.",
    )
    add = parser.add_argument
    add("--pool", metavar="NAME", help="pool (default: DP_BALANCER_POOL)")
    add("--rate", type=_rate, default=10.0, metavar="R", help="mean arrivals per second (default 10)")
    add("--requests", type=int, metavar="N", help="stop after N requests")
    add("--seconds", type=float, metavar="S", help="stop after S seconds")
    add("--until-eof", action="store_true", help="stop when standard input ends")
    add("--max-input", type=int, default=8_192, metavar="N", help="cut prompts to N tokens (default 8192)")
    add("--max-output", type=int, default=200, metavar="N", help="cut answers to N tokens (default 200)")
    add("--patience", type=float, default=30.0, metavar="S", help="wait S seconds for open requests (default 30)")
    add("--seed", type=int, default=1, metavar="N", help="seed of lengths and arrivals (default 1)")
    add("--prefix", metavar="TEXT", help="what request ids begin with (default: the dispatcher's name)")
    add("--log-every", type=float, default=10.0, metavar="S", help="seconds between two lines of log (default 10)")
    add("--alive", type=Path, metavar="FILE", help="file to touch every second while dispatches are answered")
    return parser


def _rate(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stream that the command line describes; exit codes as the command line's: 0 and 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.from_environment(pool=options.pool)
        settings.checked_address()
    except BalancerError as error:
        print(f"traffic: {error}", file=sys.stderr)
        return 2
    plan = Plan(
        rate_per_s=options.rate,
        prefix=options.prefix or f"{settings.name}-{time.time_ns() // 1_000_000:x}",
        requests=options.requests,
        seconds=options.seconds,
        max_input_tokens=options.max_input,
        max_output_tokens=options.max_output,
        seed=options.seed,
        patience_s=options.patience,
    )
    asyncio.run(_run(plan, settings, options.log_every, options.alive, options.until_eof))
    return 0


if __name__ == "__main__":
    sys.exit(main())
