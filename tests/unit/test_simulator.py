"""The simulator: engines keep their books and wait at a barrier, baselines do as their sources, twins as the Lua."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from balancer.cli import main
from balancer.errors import InvalidInput
from balancer.scripts import policy_names
from balancer.simulator import (
    H20,
    H200,
    EngineKind,
    Moment,
    Objective,
    Profile,
    Report,
    Scenario,
    Stream,
    capacity_per_s,
    compare,
    make_balancer,
    simulate,
    summary,
)
from balancer.simulator.baselines import Seed, SglangTotalTokens, VllmScore
from balancer.simulator.engine import Engine, Progress
from balancer.simulator.experiment import Estimate
from balancer.simulator.policies import TWINS, CostEnvelope, Envelope, Loads, PendingEnvelope, one_of_least
from balancer.simulator.stream import decode_rate_per_s, prefill_rate_per_s, requests_per_rank, resampled
from balancer.simulator.trials import PrefillEnvelope
from balancer.workload import TimedRequest, generate, load_trace, scaled
from scheduler_hooks.mock_engine.cost import CostModel
from scheduler_hooks.mock_engine.scheduler import KV_CAPACITY_TOKENS

TRACES = Path(__file__).parents[3] / "shared" / "traces"
ROUND = Profile("round", 10.0, 1e3, 0.0, 0.0, 100.0, 0.0, 0.0, 1_000_000)
"""A step costs 10 ms and 1 us per KV token; a prefilled token 100 us."""


def stream_of(*requests: tuple[float, int, int]) -> Stream:
    """Requests as (arrival in s, input, output)."""
    return Stream.of([TimedRequest(*request) for request in requests])


def chat(count: int, seed: int, scenario: Scenario, per_rank: float = 40) -> Stream:
    """Generated chat at the rate that puts `per_rank` requests on each rank of a decode engine."""
    requests = generate(count, seed, 1.0)
    if scenario.kind is EngineKind.DECODE:
        return Stream.of(scaled(requests, rate_per_s=decode_rate_per_s(requests, scenario, per_rank)))
    return Stream.of(scaled(requests, rate_per_s=prefill_rate_per_s(requests, scenario, 0.3)))


class Fixed:
    """A balancer that places as told."""

    reads, is_aged = Moment.AFTER_STEP, False

    def __init__(self, *ranks: int) -> None:
        self._ranks = ranks

    def place(self, now_s: float, dispatcher: int, indices: Sequence[int]) -> list[int]:
        return [self._ranks[index] for index in indices]

    def observe(self, now_s: float, report: Report) -> None: ...

    def complete(self, index: int) -> None: ...


def run_fixed(stream: Stream, scenario: Scenario, *ranks: int):  # type: ignore[no-untyped-def]
    return simulate(stream, scenario, lambda *_: Fixed(*ranks))


def test_the_simulator_and_the_mock_engine_have_the_same_prices() -> None:
    mock = CostModel()
    assert (H200.base_ms, H200.kv_ns, H200.request_us) == (mock.base_ms, mock.kv_ns, mock.request_us)
    assert H200.prefill_us == mock.prefill_us
    assert H200.kv_capacity_tokens == KV_CAPACITY_TOKENS
    assert all(900 <= profile.request_kv_tokens <= 2_200 for profile in (H200, H20))


# -- engines


@pytest.mark.parametrize("kind", EngineKind)
def test_an_engine_holds_at_every_moment_what_its_requests_add_up_to(kind: EngineKind) -> None:
    scenario = Scenario(ranks=3, kind=kind, chunk_tokens=1_500)
    source = random.Random(kind)
    requests = [TimedRequest(0.0, source.randint(1, 5_000), source.randint(1, 30)) for _ in range(60)]
    stream, progress = Stream.of(requests), Progress.of(60)
    engine = Engine(scenario, stream, progress)
    places, generated = [source.randrange(3) for _ in requests], [0] * 60
    for step in range(2_000):
        if step < 60:
            engine.send(step, places[step], float(step))
        engine.take(float(step))
        if engine.begin() is None:
            break
        engine.grow(step + 0.5)
        engine.release(step + 0.5)
        here = [index for index in range(60) if progress.received_s[index] >= 0 > progress.finished_s[index]]
        for index in here:
            is_paused = kind is EngineKind.PREFILL_FIRST and places[index] in engine.prefilling
            has_begun = progress.first_token_s[index] >= 0
            generated[index] += has_begun and not (is_paused and generated[index])
        for place in range(3):
            mine = [index for index in here if places[index] == place]
            assert engine.requests[place] == len(mine)
            assert engine.held[place] == sum(requests[index].input_tokens + generated[index] for index in mine)
            assert engine.held[place] >= engine.kv[place] >= 0
    assert min(progress.finished_s) > 0
    assert engine.held == engine.kv == engine.running == engine.requests == [0, 0, 0]
    assert engine.coming_tokens == engine.coming_requests == engine.pending == [0, 0, 0]
    assert all(generated[index] == requests[index].output_tokens - 1 for index in range(60))


def test_all_ranks_wait_for_the_dearest_one() -> None:
    # Rank 0 attends to 10,000 tokens (20 ms with the base), rank 1 to 100; both get a token every 20 ms.
    run = run_fixed(stream_of((0, 10_000, 3), (0, 100, 3)), Scenario(ranks=2, profile=ROUND), 0, 1)
    steps_s = [0.020, 0.020001, 0.020002]
    assert run.progress.first_token_s == pytest.approx([steps_s[0]] * 2)
    assert run.progress.finished_s == pytest.approx([sum(steps_s)] * 2)
    # Equal work would have taken half of the 10 ms above the base.
    assert summary(run).barrier_waste == pytest.approx((0.010 - 0.00505) / 0.020, rel=1e-3)


def test_engines_of_one_pool_do_not_wait_for_each_other() -> None:
    run = run_fixed(stream_of((0, 10_000, 1), (0, 100, 1)), Scenario(ranks=1, engines=2, profile=ROUND), 0, 1)
    assert run.progress.finished_s == pytest.approx([0.020, 0.0101])


def test_a_rank_takes_requests_at_the_begin_of_a_step_only() -> None:
    run = run_fixed(stream_of((0, 10_000, 3), (0.001, 100, 1)), Scenario(ranks=2, profile=ROUND), 0, 1)
    assert run.progress.received_s == pytest.approx([0, 0.020])
    assert run.progress.first_token_s[1] == pytest.approx(0.040001)


def test_a_request_on_its_way_wakes_an_idle_engine_when_it_arrives() -> None:
    run = run_fixed(stream_of((0, 100, 1), (5, 100, 1)), Scenario(ranks=1, profile=ROUND, send_s=0.5), 0, 0)
    assert run.progress.received_s == pytest.approx([0.5, 5.5])


def test_prefill_first_stops_the_decoding_of_its_rank_and_mixed_does_not() -> None:
    # A decodes from 20 ms on; B's 100 tokens (10 ms) come during A's second step.
    stream = stream_of((0, 100, 5), (0.0201, 100, 1))
    first = run_fixed(stream, Scenario(ranks=1, profile=ROUND, kind=EngineKind.PREFILL_FIRST), 0, 0)
    mixed = run_fixed(stream, Scenario(ranks=1, profile=ROUND, kind=EngineKind.MIXED), 0, 0)
    decode_s = [0.010101, 0.010102, 0.010103, 0.010104]
    assert first.progress.first_token_s == pytest.approx([0.020, 0.020 + decode_s[0] + 0.020])
    assert first.progress.finished_s[0] == pytest.approx(0.020 + sum(decode_s) + 0.020)
    assert mixed.progress.first_token_s == pytest.approx([0.020, 0.020 + decode_s[0] + decode_s[1] + 0.010])
    assert mixed.progress.finished_s[0] == pytest.approx(0.020 + sum(decode_s) + 0.010)


def test_a_prompt_longer_than_a_chunk_takes_several_steps_and_delays_the_other_ranks() -> None:
    scenario = Scenario(ranks=2, profile=ROUND, kind=EngineKind.PREFILL_FIRST, chunk_tokens=1_000)
    run = run_fixed(stream_of((0, 2_500, 1), (0, 10, 2)), scenario, 0, 1)
    assert run.progress.first_token_s == pytest.approx([0.11 + 0.11 + 0.06, 0.11])
    assert run.progress.finished_s[1] == pytest.approx(0.22)


def test_a_full_rank_lets_requests_wait_and_runs_what_is_larger_than_itself_alone() -> None:
    small = Profile("small", 10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, kv_capacity_tokens=100)
    run = run_fixed(stream_of((0, 90, 5), (0, 90, 5), (0, 900, 2)), Scenario(ranks=1, profile=small), 0, 0, 0)
    assert run.progress.finished_s == pytest.approx([0.05, 0.10, 0.12])


# -- the simulation as a whole


@pytest.mark.parametrize("name", ["minimum_tokens", "envelope", "sglang_total_tokens", "vllm", "seed", "power_of_two"])
@pytest.mark.parametrize("kind", EngineKind)
def test_every_request_is_complete_once_and_a_run_can_be_repeated(name: str, kind: EngineKind) -> None:
    scenario = Scenario(ranks=4, engines=2, kind=kind, dispatchers=4, shared=False, report_age_s=0.05)
    stream = chat(400, 1, scenario)
    one, two = (simulate(stream, scenario, make_balancer(name), seed=3) for _ in range(2))
    assert one.progress == two.progress
    if name != "seed":  # its dispatchers share one state, so it does not matter which of them a seed picks
        assert one.progress != simulate(stream, scenario, make_balancer(name), seed=4).progress
    for index in range(len(stream)):
        moments = one.progress
        assert stream.arrival_s[index] <= moments.received_s[index] < moments.first_token_s[index]
        assert moments.first_token_s[index] <= moments.finished_s[index]
        assert 0 <= moments.rank[index] < 8


def test_private_views_herd_where_a_shared_one_spreads() -> None:
    # Three ranks hold 5,000 tokens and one 100 when twelve requests come at once, mostly to different dispatchers.
    warm = [(0.0, 5_000, 400), (0.2, 5_000, 400), (0.4, 5_000, 400), (0.6, 100, 400)]
    stream = stream_of(*warm, *[(1.0, 500, 5)] * 12)

    def on_the_emptiest(shared: bool) -> int:
        scenario = Scenario(ranks=4, profile=ROUND, dispatchers=12, shared=shared)
        ranks = simulate(stream, scenario, make_balancer("minimum_tokens")).progress.rank
        assert sorted(ranks[:4]) == [0, 1, 2, 3]
        return ranks[4:].count(ranks[3])

    assert on_the_emptiest(shared=True) == 10  # until it holds as much as the others
    assert on_the_emptiest(shared=False) == 12


def test_old_reports_are_read_late_and_received_ids_are_never_counted_twice() -> None:
    seen: list[tuple[float, float, list[int], list[int]]] = []

    class Watching(Fixed):
        is_aged = True

        def observe(self, now_s: float, report: Report) -> None:
            seen.append((now_s, report.now_s, report.held, report.received))

    scenario = Scenario(ranks=1, profile=ROUND, report_age_s=0.1, acknowledgement_age_s=0.115)
    simulate(stream_of((0, 100, 30)), scenario, lambda *_: Watching(0))
    assert all(read_s == pytest.approx(taken_s + 0.1) for read_s, taken_s, _, _ in seen)
    assert [received for *_, received in seen[:4]] == [[], [], [0], []]
    assert [held for _, _, held, _ in seen[:2]] == [[101], [102]]


def test_a_list_is_placed_largest_first_and_answered_in_its_order() -> None:
    stream = stream_of((0, 10, 5), (0, 500, 5), (0, 490, 5))
    run = simulate(stream, Scenario(ranks=2, profile=ROUND, list_size=3), make_balancer("minimum_tokens"))
    small, large, middle = run.progress.rank
    assert large != middle
    assert small == middle


def test_regret_is_what_a_placement_adds_to_the_next_step_beyond_the_best() -> None:
    # The third request (1,000 tokens) goes to the rank that holds 5,000 beside an empty one: 1,000 us too much.
    pile = stream_of((0, 5_000, 9), *[(0.001, 1, 1)] * 7, (0.002, 1_000, 2))
    scenario = Scenario(ranks=3, profile=ROUND)
    bad = run_fixed(pile, scenario, 0, *[1] * 7, 0).recorder
    good = run_fixed(pile, scenario, 0, *[1] * 7, 2).recorder
    assert bad.placements == good.placements == 2
    assert bad.regret_s == pytest.approx(1_000e-6)
    assert good.regret_s == 0


# -- twins


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("changes", [{}, {"engines": 2, "ranks": 6, "report_age_s": 0.1, "list_size": 8}])
def test_the_shipped_lua_and_its_twin_decide_alike(policy: str, changes: dict[str, float]) -> None:
    pytest.importorskip("lupa", reason="the embedded Lua is an extra: pip install '.[simulator]'")
    assert policy in TWINS, f"lua/policies/{policy}.lua has no twin in balancer/simulator/policies.py yet"
    scenario = Scenario(**{"ranks": 12, **changes})  # type: ignore[arg-type]
    stream = chat(400, 5, scenario)
    ours = simulate(stream, scenario, make_balancer(policy)).progress
    shipped = simulate(stream, scenario, make_balancer(f"lua:{policy}")).progress
    assert ours.rank == shipped.rank
    assert ours.finished_s == shipped.finished_s


def test_of_equals_the_turn_decides() -> None:
    assert [one_of_least([5, 3, 3, 3], turn) for turn in range(4)] == [1, 2, 3, 1]


def test_the_envelope_prefers_few_requests_within_it_and_few_tokens_beyond_it() -> None:
    policy = Envelope()
    # E = min(12,000, 8,750 + 0.25 x 4,000) = 9,750: of the ranks with room for 100, those with 3 requests, the fuller.
    policy.choose(Loads([0] * 4, [0] * 4, [0] * 4), 4_000, 0)
    loads = Loads([12_000, 9_000, 9_500, 4_500], [1, 3, 3, 30], [0] * 4)
    assert policy.choose(loads, 100, 0) == 2
    assert policy.choose(loads, 20_000, 0) == 3, "a giant fits nowhere"


def test_other_envelopes_weigh_what_the_envelope_leaves_out() -> None:
    # 1,500 tokens a request: costs 10,500, 11,000, 4,600; the envelope ends at 8,700 + 25, so only rank 2 has room.
    assert CostEnvelope().choose(Loads([9_000, 2_000, 1_600], [1, 6, 2], [0] * 3), 100, 0) == 2
    # The fewest tokens and requests are on rank 1, but a prompt is ahead there.
    loads = Loads([9_000, 2_000, 8_000], [5, 1, 4], pending=[0, 700, 0], in_flight=[0, 700, 10])
    assert PendingEnvelope().choose(loads, 100, 0) == 0
    assert PrefillEnvelope().choose(loads, 100, 0) == 2


# -- baselines


def report(now_s: float, held: list[int], requests: list[int], **more: object) -> Report:
    values = {"running": requests, "kv": held, "pending": [0] * len(held), "received": [], "prefilling": set(), **more}
    return Report(now_s, 0, held, requests, **values)  # type: ignore[arg-type]


def test_sglang_overwrites_what_it_added_with_each_new_snapshot() -> None:
    stream = stream_of(*[(0, 1_000, 5)] * 8)
    sglang = SglangTotalTokens(Scenario(ranks=2), stream, Progress.of(8), 0)
    assert sglang.place(1.0, 0, [0, 1, 2]) == [0, 1, 0]  # ties to the first rank; prompts are added
    sglang.observe(1.001, report(1.001, [100, 200], [1, 1], prefilling={0, 1}))
    assert sglang.place(1.010, 0, [3]) == [1]  # within 20 ms of the last refresh: own counts, 2000 beside 1000
    assert sglang.place(1.021, 0, [4, 5]) == [0, 1]  # refreshed: 100 beside 200, and 1,000 just added
    sglang.observe(1.030, report(1.030, [900, 300], [2, 2]))  # the first decode step after it is not published
    assert sglang.place(1.050, 0, [6]) == [0]


def test_sglang_publishes_every_fifteenth_decode_step() -> None:
    sglang = SglangTotalTokens(Scenario(ranks=2), stream_of((0, 10, 5)), Progress.of(1), 0)
    for step in range(14):
        sglang.observe(float(step), report(float(step), [700, 300], [1, 1]))
    assert sglang.place(20.0, 0, [0]) == [0]
    sglang.observe(21.0, report(21.0, [700, 300], [1, 1]))
    assert sglang.place(22.0, 0, [0]) == [1]


def test_sglang_and_the_seed_do_not_see_the_rest_of_a_prompt_that_a_chunk_has_cut() -> None:
    # Rank 0 prefills 5,000 tokens in chunks of 1,000; rank 1 holds 3,000 that decode.
    stream = stream_of((0, 5_000, 2), (0, 3_000, 90), (0.21, 100, 2))
    scenario = Scenario(ranks=2, profile=ROUND, kind=EngineKind.PREFILL_FIRST, chunk_tokens=1_000)
    seen: list[Report] = []

    class Watching(Fixed):
        reads = Moment.BEFORE_RELEASE

        def observe(self, now_s: float, report: Report) -> None:
            seen.append(report)

    simulate(stream, scenario, lambda *_: Watching(0, 1, 1))
    assert [one.cut for one in seen[:5]] == [{0: 4_000, 1: 2_000}, {0: 3_000, 1: 1_000}, {0: 2_000}, {0: 1_000}, {}]
    assert seen[1].held == [5_000, 3_000]
    assert seen[1].counted_by_sglang() == [2_000, 2_000]
    assert seen[4].counted_by_sglang() == seen[4].held


def test_vllm_scores_its_own_requests_the_snapshot_and_a_full_cache() -> None:
    stream, progress = stream_of(*[(0, 10, 5)] * 9), Progress.of(9)
    vllm = VllmScore(Scenario(ranks=2, dispatchers=2, profile=ROUND), stream, progress, 0)
    # Server 1 begins its scans at rank 1; each choice is one request, taken for two, and moves the begin on.
    assert vllm.place(0.0, 1, [0, 1, 2]) == [1, 0, 1]
    progress.rank[:3] = [1, 0, 1]
    # Running 3 and 9: at once, since nothing was published before. Rank 0: max(2 x 1, 3), rank 1: max(2 x 2, 9).
    vllm.observe(0.05, report(0.05, [0, 0], [3, 9]))
    assert vllm.place(0.06, 1, [3]) == [0]
    # Within 100 ms nothing new is published; after it, 1 waiting of 4 on a full cache scores 4 + 1 x 6 x 0.5 = 7.
    vllm.observe(0.07, report(0.07, [0, 0], [4, 6], running=[3, 6], kv=[1_000_000, 0]))
    assert vllm._copies[1][0] == [2, 3, 0.0]
    assert vllm.place(0.16, 0, [4]) == [1]
    for index in (0, 2):
        vllm.complete(index)
    assert vllm._unfinished[1] == [2, 0]


def test_the_seed_sees_new_counts_at_every_fortieth_step_only() -> None:
    stream, progress = stream_of(*[(0, 1_000, 5)] * 4), Progress.of(4)
    seed = Seed(Scenario(ranks=2), stream, progress, 0)
    assert seed.place(0.0, 0, [0, 1]) == [0, 1]
    progress.rank[:2] = [0, 1]
    for step in range(39):
        seed.observe(float(step), report(float(step), [9_000, 0], [1, 1], received=[0, 1] if not step else []))
    assert seed.place(39.0, 0, [2]) == [0]  # both still 1,000 in flight, though rank 0 holds 9,000
    progress.rank[2] = 0
    seed.observe(40.0, report(40.0, [9_000, 1_005], [1, 1]))
    assert seed._in_flight == [1_000, 0]
    assert seed.place(41.0, 0, [3]) == [1]


# -- streams, numbers, the command


def test_a_resampled_stream_keeps_pieces_of_the_trace_as_they_are() -> None:
    trace = generate(2_000, 3, 10.0)
    lengths = [(one.input_tokens, one.output_tokens) for one in trace]
    drawn = resampled(trace, 5_000, 1)
    assert len(drawn) == 5_000
    assert drawn == resampled(trace, 5_000, 1) != resampled(trace, 5_000, 2)
    start = lengths.index((drawn[0].input_tokens, drawn[0].output_tokens))
    piece = trace[start : start + 256]
    assert [(one.input_tokens, one.output_tokens) for one in drawn[:256]] == lengths[start : start + 256]
    assert drawn[255].arrival_s == pytest.approx(piece[-1].arrival_s - piece[0].arrival_s)


@pytest.mark.parametrize("profile", [H200, H20])
def test_the_rate_puts_the_wanted_number_of_requests_on_each_rank(profile: Profile) -> None:
    scenario = Scenario(ranks=4, profile=profile, warm_up=0.4, cool_down=0.2)
    run = simulate(chat(4_000, 2, scenario, 50), scenario, make_balancer("minimum_tokens"))
    samples = [sum(sample.requests) / 4 for sample in run.recorder.samples if sample.now_s > run.recorder.from_s]
    middle = samples[len(samples) // 4 : -len(samples) // 3]
    assert sum(middle) / len(middle) == pytest.approx(50, rel=0.15)
    requests = generate(100, 0, 1.0)
    assert requests_per_rank(requests, scenario, 1e9, 0.5) * 1_300 < profile.kv_capacity_tokens


def test_a_comparison_pairs_balancers_by_seed() -> None:
    scenario = Scenario(ranks=4, warm_up=0.2)
    told: list[tuple[int, int]] = []
    result = compare(
        ["round_robin", "minimum_tokens"],
        scenario,
        lambda seed: chat(600, seed, scenario),
        range(3),
        lambda done, of: told.append((done, of)),
    )
    assert result.change("minimum_tokens", "minimum_tokens", "tpot_mean_ms") == Estimate(0.0, 0.0)
    assert result.change("minimum_tokens", "round_robin", "barrier_waste").mean < 0
    assert told[-1] == (3_600, 3_600)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_estimate_is_students_interval() -> None:
    assert Estimate.of([2.0]) == Estimate(2.0, 0.0)
    assert Estimate.of([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / 3**0.5)


def test_capacity_is_higher_where_less_is_promised() -> None:
    scenario = Scenario(ranks=2, profile=H20, warm_up=0.2)
    requests = generate(120, 1, 1.0)

    def at(rate: float) -> Stream:
        return Stream.of(scaled(requests, rate_per_s=rate))

    strict, lax = (
        capacity_per_s("minimum_tokens", scenario, at, Objective(tpot_p99_ms=limit), 8.0, precision=0.1)
        for limit in (32, 45)
    )
    assert 0 < strict < lax
    assert capacity_per_s("minimum_tokens", scenario, at, Objective(tpot_p99_ms=1), 1e5) == 0


def test_a_hundred_thousand_requests_are_no_trouble() -> None:
    scenario = Scenario(ranks=16, warm_up=0.1, cool_down=0.1)
    result = summary(simulate(chat(100_000, 1, scenario, 400), scenario, make_balancer("minimum_tokens")))
    assert result.requests == 80_000
    assert result.kv_max_mean < 1.1


def test_a_trace_without_arrivals_runs_on_every_kind_of_engine() -> None:
    trace = TRACES / "sharegpt_lengths.csv.gz"
    if not trace.is_file():
        pytest.skip("the traces of ../shared/traces are not here")
    requests = load_trace(trace, rate_per_s=1.0)[:500]
    for kind in EngineKind:
        scenario = Scenario(kind=kind, ranks=8)
        rate = prefill_rate_per_s(requests, scenario, 0.2)
        assert (
            summary(
                simulate(Stream.of(scaled(requests, rate_per_s=rate)), scenario, make_balancer("envelope"))
            ).tpot_mean_ms
            > 0
        )


def test_the_command_prints_a_table_and_writes_json_and_a_page_that_needs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--requests 300 --ranks 4 --seeds 2 --per-rank 10 --balancers minimum_tokens,envelope,vllm"
    files = ["--json", str(tmp_path / "out" / "result.json"), "--html", str(tmp_path / "page.html")]
    assert main(["simulate", *options.split(), "--slo-tpot-p99-ms", "25", *files]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("generated chat, ")
    assert [line.split()[0] for line in shown[-3:]] == ["minimum_tokens", "envelope", "vllm"]
    assert shown[2].endswith("capacity/s")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["balancers"]["envelope"]["metrics"]["tpot_mean_ms"]["mean"] > 20
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 10
    assert not re.search(r"https?:|src=|href=|<script|<link|@import|url\(", page)
    assert not re.search(r"\bnan\b|\binf\b", page)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--balancers nobody", "no balancer 'nobody'"),
        ("--dispatchers 33", "dispatchers must be 1 to 32"),
        ("--ranks 0", "ranks must be at least 1"),
        ("--warm-up 1", "leave some to measure"),
        ("--seeds 0", "seeds must be at least 1"),
        ("--trace nowhere.csv", "nowhere.csv"),
        ("--rate -1", "rate is -1"),
        ("--private --dispatchers 2 --balancers lua:minimum_tokens", "shares its state"),
    ],
)
def test_the_command_says_what_cannot_be_simulated(
    options: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--requests", "10", *options.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_an_unknown_balancer_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="sglang_total_tokens"):
        make_balancer("lua:nobody")
