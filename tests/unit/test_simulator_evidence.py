"""What the README says of policies, at a size that a test can run: each claim once, with room for chance."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.simulator import H20, H200, EngineKind, Scenario, Stream, compare
from balancer.simulator.stream import decode_rate_per_s, prefill_rate_per_s, requests_per_rank, resampled
from balancer.workload import TimedRequest, load_trace, scaled

TRACES = Path(__file__).parents[3] / "shared" / "traces"


def trace(name: str) -> list[TimedRequest]:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"the trace {path.name} of ../shared/traces is not here")
    return load_trace(path, rate_per_s=1.0)


@pytest.mark.parametrize(("count", "seeds"), [(100, 24), (4_096, 2)])
def test_minimum_tokens_helps_a_hundred_prompts_at_once_and_hardly_four_thousand(count: int, seeds: int) -> None:
    # Given the seed's benchmark: ShareGPT prompts at an infinite rate on 16 ranks with DP attention
    prompts = trace("sharegpt_lengths.csv.gz")
    scenario = Scenario(kind=EngineKind.PREFILL_FIRST, profile=H20)

    def at_once(seed: int) -> Stream:
        return Stream.of(scaled(resampled(prompts, count, seed), rate_per_s=math.inf))

    compared = compare(["round_robin", "minimum_tokens"], scenario, at_once, range(seeds))
    change = {
        metric: compared.change("minimum_tokens", "round_robin", metric)
        for metric in ("ttft_mean_ms", "ttft_p99_ms", "itl_mean_ms")
    }
    # Then a hundred are served better, and with so many that every rank queues the difference nearly vanishes
    if count == 100:
        assert all(one.mean + one.half_width < 0 for one in change.values()), change
        assert change["ttft_p99_ms"].mean < -0.08
    else:
        assert all(abs(one.mean) < 0.03 for one in change.values()), change


def test_sixteen_dispatchers_with_one_view_are_as_good_as_one_and_with_views_of_their_own_are_not() -> None:
    # Given a busy decode pool whose reports are 100 ms old
    requests = trace("azure2023_conv.csv.gz")
    one = Scenario(profile=H20, report_age_s=0.1, warm_up=0.35, cool_down=0.1)
    rate_per_s = decode_rate_per_s(requests, one, requests_per_rank(requests, one, 256, 0.75))

    def stream(seed: int) -> Stream:
        return Stream.of(scaled(resampled(requests, 8_000, seed), rate_per_s=rate_per_s))

    for policy in ("envelope", "minimum_tokens"):
        sides = {
            "one": one,
            "shared": replace(one, dispatchers=16),
            "private": replace(one, dispatchers=16, shared=False),
        }
        tpot = {
            side: compare([policy], scenario, stream, [0]).estimate(policy, "tpot_mean_ms").mean
            for side, scenario in sides.items()
        }
        assert tpot["shared"] == pytest.approx(tpot["one"], rel=0.005)
        assert tpot["private"] > 1.03 * tpot["one"]


def test_on_unified_engines_prompts_in_flight_matter_more_than_tokens_held() -> None:
    requests = trace("azure2023_conv.csv.gz")
    for kind in (EngineKind.PREFILL_FIRST, EngineKind.MIXED):
        scenario = Scenario(kind=kind, profile=H200, warm_up=0.25, cool_down=0.1)
        rate_per_s = prefill_rate_per_s(requests, scenario, 0.2)

        def stream(seed: int, rate: float = rate_per_s) -> Stream:
            return Stream.of(scaled(resampled(requests, 3_000, seed), rate_per_s=rate))

        compared = compare(["minimum_tokens", "envelope", "pending_envelope"], scenario, stream, range(2))
        tpot = {name: compared.estimate(name, "tpot_mean_ms").mean for name in compared.summaries}
        assert tpot["pending_envelope"] < 0.97 * tpot["envelope"] < 0.97 * tpot["minimum_tokens"]
