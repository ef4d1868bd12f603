"""Where the next long prompt goes while a rank still prefills one: SGLang's `total_tokens` beside the pool's count.

    python -m tests.bench.sglang_long_prompt

A prompt that is prefilled in chunks has left SGLang's queue, and only the chunks done so far are in its KV cache. From
the first chunk on SGLang counts nothing else of it, so until it has caught up with what the other ranks hold, its rank
looks like the emptiest to SGLang's controller, whatever it has still to prefill.

One server, whose controller balances by total_tokens. The methods take turns: no rank named (SGLang chooses), or the
rank that a dispatcher names by the pool's `minimum_tokens`: the same rule, with the whole prompt counted.

    after one another   rank 1 decodes some chats; a long prompt comes, goes to rank 0; GAP ms later a second one comes.
                        Where does it go, and when does its first token come?
    traffic             chats and now and then a long prompt, at random times, the same for both methods
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from balancer import Dispatcher, PoolAdmin, PoolSnapshot, Settings
from balancer.embedded import EmbeddedRedis
from tests.bench.measuring import interval
from tests.bench.sglang import say
from tests.engines.sglang.server import ROOT, SGLangServer, what_is_missing

METHODS = ("total_tokens", "minimum_tokens")
POOL = "long"


@dataclass(frozen=True)
class Sent:
    """One request: which rank had it, when it was sent, how long its first token took."""

    tokens: int
    rank: int
    at_s: float
    first_token_s: float


class Traffic:
    """Requests to the server by one of the methods."""

    def __init__(self, server: SGLangServer, pool: Dispatcher, method: str) -> None:
        self._server, self._pool = server, pool
        self._names_ranks = method == "minimum_tokens"
        self._threads = ThreadPoolExecutor(128)

    def send(self, tokens: int, new_tokens: int = 2, rank: int | None = None, id_: str = "") -> Callable[[], Sent]:
        """Send one; the answer, once called for."""
        id_ = id_ or f"{tokens}-{time.monotonic_ns()}"
        sampling = {"max_new_tokens": new_tokens, "ignore_eos": True}
        ids = random.choices(range(5, 95), k=tokens)
        return self._threads.submit(self._send, id_, {"input_ids": ids, "sampling_params": sampling}, rank).result

    def _send(self, id_: str, body: dict[str, Any], rank: int | None) -> Sent:
        began, tokens = time.monotonic(), len(body["input_ids"])
        if rank is None and self._names_ranks:
            rank = self._pool.dispatch(id_, tokens).index
        body |= {"rid": id_, "stream": True} | ({} if rank is None else {"routed_dp_rank": rank})
        headers = {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=300)) as connection:
            connection.request("POST", "/generate", json.dumps(body), headers)
            with connection.getresponse() as answer:
                first = json.loads(answer.readline().removeprefix(b"data: "))
                took_s = time.monotonic() - began
                answer.read()
        return Sent(tokens, first["meta_info"]["dp_rank"], began, took_s)

    def abort(self, id_: str) -> None:
        """End one before its time."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)) as connection:
            connection.request("POST", "/abort_request", json.dumps({"rid": id_}), {"Content-Type": "application/json"})
            connection.getresponse().close()

    def end(self) -> None:
        self._threads.shutdown()


def wait_for(pool: Dispatcher, condition: Callable[[PoolSnapshot], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition(pool.snapshot()):
        assert time.monotonic() < deadline, f"not within 120 s: {what}"
        time.sleep(0.01)


def is_at_rest(snapshot: PoolSnapshot) -> bool:
    return not any(rank.load_tokens or rank.requests for rank in snapshot.ranks)


@contextmanager
def chatting(traffic: Traffic, pool: Dispatcher, arguments: argparse.Namespace) -> Iterator[None]:
    """Chats that decode on all ranks but the first one."""
    others, each = range(1, arguments.ranks), arguments.held // arguments.chats
    ids = {f"chat-{rank}-{number}-{time.monotonic_ns()}": rank for rank in others for number in range(arguments.chats)}
    chats = [traffic.send(each, 2_000, rank=rank, id_=id_) for id_, rank in ids.items()]

    def decode(snapshot: PoolSnapshot) -> bool:
        index = {int(rank.rank.rpartition("/")[2]): rank for rank in snapshot.ranks}
        return all(index[at].requests == arguments.chats and index[at].pending_tokens == 0 for at in others)

    try:
        wait_for(pool, decode, "the chats decode")
        yield
    finally:
        for id_ in ids:
            traffic.abort(id_)
        for chat in chats:
            chat()
        wait_for(pool, is_at_rest, "the pool is at rest")


def one_after_the_other(
    server: SGLangServer, pool: Dispatcher, method: str, gap_ms: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Whether the second long prompt followed the first, what was counted of the first then, first tokens' seconds."""
    traffic = Traffic(server, pool, method)
    with chatting(traffic, pool, arguments):
        one = traffic.send(arguments.long)
        time.sleep(gap_ms / 1000)
        counted = server.counted()
        loads = {int(rank.rank.rpartition("/")[2]): rank.load_tokens for rank in pool.snapshot().ranks}
        other = traffic.send(arguments.long)
        first, second = one(), other()
    traffic.end()
    return {
        "followed": second.rank == first.rank,
        "counted_by_sglang": counted[first.rank],
        "counted_by_us": loads[first.rank],
        "least_of_the_others": min(count for rank, count in counted.items() if rank != first.rank),
        "first_s": first.first_token_s,
        "second_s": second.first_token_s,
    }


def random_traffic(
    server: SGLangServer, pool: Dispatcher, method: str, seed: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Chats and long prompts at random times, alike for a seed; how many long ones joined a rank that prefilled one
    while another rank did not, and the seconds of first tokens."""
    rng, traffic = random.Random(seed), Traffic(server, pool, method)
    plan = []  # when, tokens, new tokens
    for rate, tokens, new_tokens in ((arguments.chat_rate, 0, 60), (arguments.long_rate, arguments.long, 8)):
        at = rng.expovariate(rate)
        while at < arguments.seconds:
            plan.append((at, tokens or min(1_000, max(8, int(rng.lognormvariate(4.7, 0.9)))), new_tokens))
            at += rng.expovariate(rate)
    began, sent = time.monotonic(), []
    for at, tokens, new_tokens in sorted(plan):
        time.sleep(max(0.0, began + at - time.monotonic()))
        sent.append(traffic.send(tokens, new_tokens))
    answers = [answer() for answer in sent]
    traffic.end()
    wait_for(pool, is_at_rest, "the pool is at rest")
    long = [answer for answer in answers if answer.tokens == arguments.long]
    chat = [answer.first_token_s for answer in answers if answer.tokens != arguments.long]
    joined = 0
    for one in long:
        busy = {other.rank for other in long if other.at_s < one.at_s < other.at_s + other.first_token_s}
        joined += one.rank in busy and len(busy) < arguments.ranks
    return {
        "joined": joined,
        "long": len(long),
        "long_s": statistics.mean(one.first_token_s for one in long),
        "slowest_s": max(one.first_token_s for one in long),
        "chat_s": statistics.mean(chat),
    }


def show_one_after_the_other(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    print(
        f"\ntwo prompts of {arguments.long:,} tokens, chunks of {arguments.chunk}; {arguments.ranks} ranks, all but "
        f"one decoding {arguments.chats} chats of {arguments.held // arguments.chats} tokens\n"
        f"{'':<34}{'first then counted as':>30}{'least of others':>18}{'second joined it':>18}{'its first token':>17}"
    )
    for name, rounds in found.items():
        of = {key: statistics.mean(one[key] for one in rounds) for key in rounds[0]}
        counts = f"{of['counted_by_sglang']:,.0f} by SGLang, {of['counted_by_us']:,.0f}"
        joined = f"{sum(one['followed'] for one in rounds)} of {len(rounds)}"
        print(f"{name:<34}{counts:>30}{of['least_of_the_others']:>18,.0f}{joined:>18}{of['second_s']:>15.2f} s")


def show_traffic(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    print(
        f"\ntraffic, {len(found[METHODS[0]])} seeds of {arguments.seconds} s: {arguments.chat_rate} chats and "
        f"{arguments.long_rate} prompts of {arguments.long:,} tokens a second, {arguments.ranks} ranks\n"
        f"{'':<18}{'joined a long one':>20}{'first token: long':>20}{'slowest':>10}{'chats':>10}"
    )
    for method, runs in found.items():
        joined = f"{sum(one['joined'] for one in runs):.0f} of {sum(one['long'] for one in runs):.0f}"
        means = [statistics.mean(one[key] for one in runs) for key in ("long_s", "slowest_s", "chat_s")]
        print(f"{method:<18}{joined:>20}{means[0]:>18.2f} s{means[1]:>8.2f} s{means[2]:>8.2f} s")
    pairs = list(zip(found[METHODS[1]], found[METHODS[0]], strict=True))
    for key, what in (("long_s", "long"), ("slowest_s", "the slowest long"), ("chat_s", "chats")):
        low, mean, high = interval([100 * (ours[key] / theirs[key] - 1) for ours, theirs in pairs])
        print(f"minimum_tokens, first token of {what}, seed by seed: {mean:+.0f} % (95 %: {low:+.0f} to {high:+.0f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=4_000, help="tokens of a long prompt")
    parser.add_argument("--held", type=int, default=2_000, help="tokens that each other rank decodes meanwhile")
    parser.add_argument("--chats", type=int, default=4, help="in so many requests")
    parser.add_argument("--gaps", default="0,200,400,800", help="ms between two long prompts")
    parser.add_argument("--rounds", type=int, default=3, help="of each gap and method")
    parser.add_argument("--seeds", type=int, default=4, help="of the traffic")
    parser.add_argument("--seconds", type=int, default=15, help="of traffic for each seed and method")
    parser.add_argument("--chat-rate", type=float, default=3.0, help="per second")
    parser.add_argument("--long-rate", type=float, default=0.5, help="per second")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a rank's chunk")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=30800)
    arguments = parser.parse_args()
    if problem := what_is_missing():
        raise SystemExit(problem)
    ranks = str(arguments.ranks)
    flags = ["--tp", ranks, "--dp", ranks, "--enable-dp-attention", "--load-balance-method", "total_tokens"]
    flags += ["--chunked-prefill-size", str(arguments.chunk * arguments.ranks)]  # SGLang divides it by the ranks
    pairs: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with EmbeddedRedis() as redis:
        url = str(redis.url)
        environment = {"DP_BALANCER_URL": url, "DP_BALANCER_POOL": POOL, "DP_BALANCER_DISPATCH": "0"}
        say(f"starting SGLang with {ranks} ranks")
        settings = Settings(url=url, pool=POOL, budget_ms=5_000)
        with SGLangServer(arguments.port, *flags, **environment) as server, Dispatcher(settings) as pool:
            with closing(PoolAdmin(settings)) as admin:
                admin.configure(policy="minimum_tokens")
            server.generate(arguments.long, 4)
            for number in range(arguments.rounds):
                for gap_ms in map(int, filter(None, arguments.gaps.split(","))):
                    for method in METHODS[:: 1 if number % 2 == 0 else -1]:
                        result = one_after_the_other(server, pool, method, gap_ms, arguments)
                        pairs.setdefault(f"{gap_ms:>4} ms later, {method}", []).append(result)
            say("pairs done")
            for seed in range(arguments.seeds):
                for method in METHODS[:: 1 if seed % 2 == 0 else -1]:
                    runs[method].append(random_traffic(server, pool, method, seed, arguments))
                    say(f"seed {seed}, {method:<14} " + json.dumps(runs[method][-1]))
    pairs = {name: pairs[name] for name in sorted(pairs)}
    if pairs:
        show_one_after_the_other(pairs, arguments)
    if runs[METHODS[0]]:
        show_traffic(runs, arguments)
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / f"sglang-long-prompt-{ranks}.json").write_text(json.dumps({"pairs": pairs, "traffic": runs}))


if __name__ == "__main__":
    main()
