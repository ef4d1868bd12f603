"""The requests of one run, as columns: a trace or the generator, resampled by a seed and brought to a rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from balancer.model import in_flight_id
from balancer.simulator.scenario import Scenario
from balancer.workload import TimedRequest, scaled

BLOCK = 256
"""Requests drawn from a trace in one piece by `resampled`: long enough to keep its bursts."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests by their index, in order of arrival; seconds and tokens."""

    arrival_s: list[float]
    input_tokens: list[int]
    output_tokens: list[int]
    ids: list[int]
    """In-flight ids; policies draw from them what must look random."""

    @classmethod
    def of(cls, requests: Sequence[TimedRequest]) -> Stream:
        """The columns of a workload."""
        return cls(
            [request.arrival_s for request in requests],
            [request.input_tokens for request in requests],
            [request.output_tokens for request in requests],
            [in_flight_id(request_id(index)) for index in range(len(requests))],
        )

    def __len__(self) -> int:
        return len(self.arrival_s)


def request_id(index: int) -> str:
    """The request id of the index-th request."""
    return f"request-{index}"


def resampled(requests: Sequence[TimedRequest], count: int, seed: int) -> list[TimedRequest]:
    """`count` requests made of pieces of a trace, drawn with replacement: the same traffic on another day.

    Each piece keeps its requests, their order and the gaps between them, so that bursts stay; `count` may be more
    than the trace has.
    """
    source = random.Random(f"{seed}/resampled")
    block = min(BLOCK, len(requests))
    drawn: list[TimedRequest] = []
    now_s = 0.0
    while len(drawn) < count:
        start = source.randrange(len(requests) - block + 1)
        piece = requests[start : start + min(block, count - len(drawn))]
        before = requests[start - 1] if start else piece[0]
        last_s = before.arrival_s
        for request in piece:
            now_s += request.arrival_s - last_s
            last_s = request.arrival_s
            drawn.append(TimedRequest(now_s, request.input_tokens, request.output_tokens))
    return scaled(drawn)


def decode_rate_per_s(requests: Sequence[TimedRequest], scenario: Scenario, per_rank: float) -> float:
    """The arrival rate at which a perfectly balanced decode pool runs `per_rank` requests on each rank.

    Little's law: a request stays for its output tokens, one each step, and is seen with half of them already there.
    """
    outputs = sum(request.output_tokens for request in requests)
    attended = sum(request.output_tokens * (request.input_tokens + request.output_tokens / 2) for request in requests)
    profile = scenario.profile
    step_ms = profile.base_ms + profile.rank_ms(per_rank * attended / outputs, per_rank)
    step_ms += per_rank * profile.shared_request_us / 1e3
    return scenario.all_ranks * per_rank / (outputs / len(requests) * step_ms / 1e3)


def prefill_rate_per_s(requests: Sequence[TimedRequest], scenario: Scenario, share: float) -> float:
    """The arrival rate at which the ranks of a unified pool prefill for this share of the time, each alone."""
    profile = scenario.profile
    linear_us = profile.prefill_us + profile.shared_prefill_us
    prefill_s = sum(
        request.input_tokens * linear_us / 1e6 + request.input_tokens**2 / 2 * profile.context_ns / 1e9
        for request in requests
    )
    return share * scenario.all_ranks * len(requests) / prefill_s


def requests_per_rank(requests: Sequence[TimedRequest], scenario: Scenario, most: float, kv_share: float) -> float:
    """Requests on a rank where at most `most` run and they fill at most `kv_share` of its KV pool."""
    outputs = sum(request.output_tokens for request in requests)
    attended = sum(request.output_tokens * (request.input_tokens + request.output_tokens / 2) for request in requests)
    return min(most, kv_share * scenario.profile.kv_capacity_tokens / (attended / outputs))
