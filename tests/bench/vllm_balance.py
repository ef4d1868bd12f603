"""Beside vLLM's own balancer: the same server, the same traffic, in turn placed by vLLM and by the pool.

    python -m tests.bench.vllm_balance [--model moe] [--held-ns 2000] [--rounds 4] [--seconds 30] [--rate 6]

One vLLM of four ranks and four API servers from the engine kit serves all rounds. In a round for vLLM the engine is
drained in the pool: then the pool has no rank to give, and vLLM's own balancer decides, in the very same processes. So
both sides pay what the plugin costs, reports and one EVAL a request; what differs is who chooses the rank. What the
plugin costs is `vllm_throughput`'s to say. Rounds alternate, and both sides of a pair get the same prompts at the same
times.
Traffic: Poisson arrivals; one prompt in eight is a document. Writes out/vllm_balance.json, prints a table.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer import Dispatcher, PoolAdmin
from tests.bench.measuring import interval
from tests.engines.vllm.kit import PORT, VllmServer, at_rest, redis_on

ENGINE_RANKS = 4
LOOK_EVERY_S = 0.1
SHORT, LONG, LONG_SHARE = (20, 250), (1_500, 4_000), 0.125
OUTPUT = (16, 160)
HELD_NS = 2_000
"""What a held token costs a step: an assumption on which TTFT and TPOT of both sides rest, so every report names it.
The kit's own 40 ns are a GPU's (20 to 115 by `balancer.simulator.profiles`), but a rank here holds thousands of tokens,
where one on a GPU holds hundreds of thousands: 5,000 would cost 0.2 ms of a step of 8, and how evenly they lie could
not matter. At 2 us they cost 10 ms, so that reading the KV cache has a part in a step as it has on a GPU."""


@dataclass(slots=True)
class Call:
    """One request: when to send it (s), words of its prompt, tokens of its answer; then what was measured (s)."""

    at_s: float
    words: int
    output: int
    first_s: float = 0.0
    end_s: float = 0.0
    failed: bool = False


def traffic(seed: int, seconds: float, rate: float) -> list[Call]:
    """Poisson arrivals with a heavy tail of prompts."""
    dice = random.Random(seed)
    calls, at_s = [], 0.0
    while (at_s := at_s + dice.expovariate(rate)) < seconds:
        words = dice.randint(*(LONG if dice.random() < LONG_SHARE else SHORT))
        calls.append(Call(at_s, words, dice.randint(*OUTPUT)))
    return calls


def send(server: VllmServer, call: Call, start: float) -> None:
    """One streamed completion; notes the time to its first token and to its end."""
    time.sleep(max(0.0, start + call.at_s - time.monotonic()))
    begun = time.monotonic()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        body = {"model": "tiny", "prompt": [17 + call.at_s.__hash__() % 97] * call.words, "max_tokens": call.output}
        text = json.dumps(body | {"ignore_eos": True, "stream": True})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        call.failed = answer.status != 200
        answer.readline()
        call.first_s = time.monotonic() - begun
        answer.read()
        call.end_s = time.monotonic() - begun
        connection.close()
    except OSError:
        call.failed = True


def look(server: VllmServer, end: threading.Event, seen: list[list[int]]) -> None:
    """Note every rank's held tokens, as the schedulers report them, until the end."""
    with Dispatcher(server.settings) as looker:
        while not end.wait(LOOK_EVERY_S):
            seen.append([rank.holding_tokens for rank in looker.snapshot().ranks])


def one_round(server: VllmServer, by_pool: bool, seed: int, seconds: float, rate: float) -> dict[str, float]:
    """One side's round; its numbers."""
    admin = PoolAdmin(server.settings)
    with Dispatcher(server.settings) as dispatcher:
        engine = dispatcher.snapshot().engines[0].engine
    admin.undrain(engine) if by_pool else admin.drain(engine)
    calls, seen, end = traffic(seed, seconds, rate), [], threading.Event()
    looking = threading.Thread(target=look, args=(server, end, seen))
    looking.start()
    start = time.monotonic() + 0.5
    threads = [threading.Thread(target=send, args=(server, call, start)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, start + seconds - time.monotonic()))
    end.set()  # what drains after the last arrival says nothing of who placed it
    for thread in threads:
        thread.join()
    took_s = time.monotonic() - start
    looking.join()
    admin.undrain(engine)
    admin.close()
    at_rest(server.settings)
    busy = [held for held in seen if sum(held) > 0]
    good = [call for call in calls if not call.failed]
    first = sorted(call.first_s for call in good)
    return {
        "requests": len(calls),
        "failed": len(calls) - len(good),
        "gap_tokens": statistics.fmean(max(held) - min(held) for held in busy),
        "max_over_mean": statistics.fmean(max(held) * len(held) / sum(held) for held in busy),
        "ttft_mean_ms": 1e3 * statistics.fmean(first),
        "ttft_p99_ms": 1e3 * first[int(len(first) * 0.99)],
        "tpot_mean_ms": 1e3 * statistics.fmean((c.end_s - c.first_s) / max(1, c.output - 1) for c in good),
        "output_tokens_per_s": sum(call.output for call in good) / took_s,
    }


def main() -> None:
    """Run the rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("moe", "dense"), default="moe")
    parser.add_argument("--held-ns", type=int, default=HELD_NS, help="of a step, for a held token; the kit's own: 40")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of rounds")
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals in each round")
    parser.add_argument("--rate", type=float, default=6, help="requests per second")
    parser.add_argument("--out", type=Path, default=Path("out/vllm_balance.json"))
    options = parser.parse_args()
    with redis_on(PORT + 403) as url:
        name, model = f"balance-{options.model}", f"tiny-{options.model}"
        costs = {"SIM_CTX_NS": str(options.held_ns)}
        server = VllmServer(name, url, PORT + 60, model=model, audited=False, environment=costs)
        server.start()
        try:
            one_round(server, True, 0, 3, options.rate)  # connections made, code warm
            pairs: list[dict[str, dict[str, float]]] = []
            for number in range(options.rounds):
                pair: dict[str, dict[str, float]] = {}
                for by_pool in (number % 2 == 0, number % 2 == 1):
                    found = one_round(server, by_pool, 100 + number, options.seconds, options.rate)
                    pair["pool" if by_pool else "vllm"] = found
                pairs.append(pair)
                print(json.dumps(pair), flush=True)
        finally:
            server.stop()
    changes = table(pairs, "vllm", "pool")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {**vars(options), "out": str(options.out), "pairs": pairs, "change_percent": changes}
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def table(pairs: list[dict[str, dict[str, Any]]], theirs: str, ours: str) -> dict[str, tuple[float, float, float]]:
    """Print the means of both sides; the change (%) from one to the other within pairs, with its interval."""
    print(f"{'':26}{theirs:>14}{ours:>14}   change, 95 % of {len(pairs)} pairs")
    changes = {}
    for name in pairs[0][ours]:
        if name in ("requests", "failed"):
            print(f"{name:26}{sum(p[theirs][name] for p in pairs):14,}{sum(p[ours][name] for p in pairs):14,}")
            continue
        means = [statistics.fmean(pair[side][name] for pair in pairs) for side in (theirs, ours)]
        low, mean, high = interval([100 * (pair[ours][name] / pair[theirs][name] - 1) for pair in pairs])
        print(f"{name:26}{means[0]:14,.2f}{means[1]:14,.2f}   {mean:+.1f} % ({low:+.1f} to {high:+.1f})")
        changes[name] = (mean, low, high)
    return changes


if __name__ == "__main__":
    main()
