"""Four dispatchers outside a real SGLang, each in a process of its own, and bursts: how evenly are its ranks filled?

    python -m tests.bench.sglang_dispatchers

A server with four ranks (plain DP), dp-balancer's hook in it and DP_BALANCER_DISPATCH=0; its own controller balances by
total_tokens, and is one of the methods. What the schedulers hold by the hook's counts is the measure for all of them,
what is in flight left out: every 20 ms the fullest rank's tokens over the mean, weighted by the mean. The methods take
turns, seed by seed, with the same lengths at the same times; the tokens themselves are new each time, so that no method
finds another's prompts in the prefix cache.

    shared/POLICY   dp-balancer: one EVAL per request, by that policy
    round_robin     each dispatcher its own turn
    polling         the least of /v1/loads, polled by each dispatcher every INTERVAL ms
    polling+own     the same, plus what the dispatcher itself has sent since
    controller      no rank named: SGLang's total_tokens decides
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from balancer import Dispatcher, PoolAdmin, Settings
from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import interval
from tests.bench.sglang import say, turns
from tests.engines.sglang.server import ROOT, SGLangServer, what_is_missing

METHODS = (
    "shared/envelope",
    "shared/minimum_tokens",
    "shared/pending_envelope",
    "round_robin",
    "polling",
    "polling+own",
    "controller",
)
POOL = "four"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Chooser:
    """One dispatcher's way to a rank."""

    def __init__(self, method: str, server: str, redis: str, pool: str, seed: int, interval_ms: int) -> None:
        self._rng = random.Random(seed)
        self._ranks = len(loads_of(server))
        self._turn = self._rng.randrange(self._ranks)
        self._seen = [0] * self._ranks
        self._lock = threading.Lock()
        self._dispatcher = (
            Dispatcher(Settings(url=redis, pool=pool, budget_ms=2_000)) if method.startswith("shared") else None
        )
        self._adds = method == "polling+own"
        self.choose: Callable[[str, int], int | None] = getattr(self, "_" + re.split("[/+]", method)[0])
        if method.startswith("polling"):
            threading.Thread(target=self._poll, args=(server, interval_ms / 1000), daemon=True).start()
            time.sleep(2 * interval_ms / 1000)

    def _shared(self, id_: str, tokens: int) -> int | None:
        assert self._dispatcher
        return self._dispatcher.dispatch(id_, tokens).index

    def _round_robin(self, id_: str, tokens: int) -> int | None:
        self._turn += 1
        return self._turn % self._ranks

    def _polling(self, id_: str, tokens: int) -> int | None:
        with self._lock:
            least = min(self._seen)
            rank = self._rng.choice([rank for rank, seen in enumerate(self._seen) if seen == least])
            if self._adds:
                self._seen[rank] += tokens
            return rank

    def _controller(self, id_: str, tokens: int) -> int | None:
        return None

    def _poll(self, server: str, interval_s: float) -> None:
        while True:
            seen = loads_of(server)
            with self._lock:
                self._seen = seen
            time.sleep(interval_s)


def loads_of(server: str) -> list[int]:
    with _OPENER.open(f"{server}/v1/loads?include=core", timeout=60) as answer:
        loads = json.loads(answer.read())["loads"]
    return [load["num_total_tokens"] for load in sorted(loads, key=lambda load: load["dp_rank"])]


def dispatcher(
    method: str, number: int, arguments: argparse.Namespace, seed: int, begin: Any, failed: Any, done: Any
) -> None:
    """One process: a burst at each beginning."""
    rng = random.Random(f"{seed}-{number}")
    chooser = Chooser(method, arguments.server, arguments.redis, POOL, seed * 10 + number, arguments.interval)
    with ThreadPoolExecutor(arguments.each) as pool:
        for burst in range(arguments.bursts):
            begin.wait()
            jobs = []
            for count in range(arguments.each):
                tokens = min(1_500, max(8, int(rng.lognormvariate(5.0, 1.1))))
                id_ = f"{method}-{seed}-{number}-{burst}-{count}"
                jobs.append(pool.submit(send, arguments, chooser, id_, tokens, rng.randrange(8, 48)))
                time.sleep(rng.expovariate(1_000 / arguments.spacing))
            failed.value += sum(not job.result() for job in jobs)
            done.wait()


def send(arguments: argparse.Namespace, chooser: Chooser, id_: str, tokens: int, new_tokens: int) -> bool:
    body: dict[str, Any] = {
        "input_ids": random.Random(id_).choices(range(5, 95), k=tokens),
        "rid": id_,
        "sampling_params": {"max_new_tokens": new_tokens, "ignore_eos": True},
    }
    rank = chooser.choose(id_, tokens)
    if rank is not None:
        body["routed_dp_rank"] = rank
    request = urllib.request.Request(
        f"{arguments.server}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _OPENER.open(request, timeout=300) as answer:
            answer.read()
        return True
    except OSError:
        return False


def measure(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Bursts by four dispatchers; max/mean of the ranks' tokens, seconds, failures."""
    context = multiprocessing.get_context("spawn")
    count = arguments.dispatchers
    begin, done, failed = context.Barrier(count + 1), context.Barrier(count + 1), context.Value("i", 0)
    processes = [
        context.Process(target=dispatcher, args=(method, number, arguments, seed, begin, failed, done))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    peaks = means = seconds = 0.0
    with Dispatcher(Settings(url=arguments.redis, pool=POOL, budget_ms=5_000)) as looker:
        for _ in range(arguments.bursts):
            begin.wait()
            began = time.monotonic()
            waiter = threading.Thread(target=done.wait)
            waiter.start()
            while waiter.is_alive():
                held = [rank.holding_tokens for rank in looker.snapshot().ranks]
                peaks, means = peaks + max(held), means + statistics.mean(held)
                time.sleep(0.02)
            seconds += time.monotonic() - began
    for process in processes:
        process.join()
    return {"max_over_mean": peaks / means, "seconds": seconds, "failed": failed.value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatchers", type=int, default=4)
    parser.add_argument("--each", type=int, default=12, help="requests per dispatcher and burst")
    parser.add_argument("--spacing", type=float, default=10, help="mean ms between two requests of a dispatcher")
    parser.add_argument("--bursts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--interval", type=int, default=100, help="between two polls, in ms")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--port", type=int, default=30700)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in arguments.methods}
    with EmbeddedRedis() as redis:
        flags = ("--dp", str(arguments.ranks), "--load-balance-method", "total_tokens", "--sleep-on-idle")
        environment = {"DP_BALANCER_URL": str(redis.url), "DP_BALANCER_POOL": POOL, "DP_BALANCER_DISPATCH": "0"}
        say(f"starting SGLang with {arguments.ranks} ranks")
        with SGLangServer(arguments.port, *flags, **environment) as server:
            arguments.server, arguments.redis = server.url, str(redis.url)
            admin = PoolAdmin(Settings(url=arguments.redis, pool=POOL, budget_ms=5_000))
            for seed in range(arguments.seeds):
                for method in turns(runs, seed):
                    if method.startswith("shared/"):
                        admin.configure(policy=method.partition("/")[2])
                    runs[method].append(measure(method, seed, arguments))
                    said = runs[method][-1]
                    say(f"seed {seed}, {method:<22} {said['max_over_mean']:.2f}  {said['seconds']:.1f} s")
            admin.close()
    print(f"\n{'':<24}{'max/mean':>9}{'95 % interval':>16}{'lowest, highest':>18}{'seconds':>9}{'failed':>8}")
    for method, found in runs.items():
        ratios = [one["max_over_mean"] for one in found]
        low, mean, high = interval(ratios)
        seconds, failed = statistics.mean(one["seconds"] for one in found), sum(one["failed"] for one in found)
        print(
            f"{method:<24}{mean:>9.2f}{f'{low:.2f} to {high:.2f}':>16}{f'{min(ratios):.2f}, {max(ratios):.2f}':>18}"
            f"{seconds:>9.1f}{failed:>8.0f}"
        )
    first, *others = runs
    print(f"\nagainst {first}, seed by seed")
    for method in others:
        pairs = zip(runs[method], runs[first], strict=True)
        low, mean, high = interval([one["max_over_mean"] - ours["max_over_mean"] for one, ours in pairs])
        print(f"{method:<24}{mean:>+9.2f}{f'{low:+.2f} to {high:+.2f}':>16}")
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "sglang-dispatchers.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
