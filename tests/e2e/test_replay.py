"""`balancer replay` from the command line, with real processes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import redis

from balancer import Settings
from balancer.cli import main
from balancer.cli.replay import VERB
from balancer.simulator import MOCK
from balancer.workload import TimedRequest
from scheduler_hooks.demo.measure import Served, Times
from scheduler_hooks.demo.stage import Played
from scheduler_hooks.mock_engine import CostModel
from scheduler_hooks.mock_engine.scheduler import KV_CAPACITY_TOKENS
from scheduler_hooks.replay.live import late_share, step_cost
from scheduler_hooks.replay.options import parser, plan_of
from scheduler_hooks.replay.run import play

SMALL = "replay --ranks 2 --requests 12 --rounds 1 --rate 20 --max-input 2000 --max-output 8 --speed 2"


def test_a_replay_shows_both_sides_writes_them_down_and_leaves_nothing(
    settings: Settings, client: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, written, shown = tmp_path / "trace.csv", tmp_path / "out" / "result.json", tmp_path / "page.html"
    rows = [f"{number / 7},{100 + 137 * number % 1500},{3 + number % 5}" for number in range(40)]
    trace.write_text("\n".join(["arrival_s,input_len,output_len", *rows]) + "\n")
    words = f"{SMALL} --url {settings.url} --trace {trace} --form leader --json {written} --html {shown}"
    assert main([*words.split(), "--policy", "minimum_tokens", "--policy", "round_robin"]) == 0
    out = capsys.readouterr().out
    assert "requests   trace.csv, 1 x 12 requests, 20 a second" in out
    rows = r"^TPOT mean, ms +minimum_tokens( +[\d.]+){2}\n +round_robin( +[\d.]+){2}( +[-+][\d.]+ %){2}$"
    assert re.search(rows, out, re.MULTILINE)
    result = json.loads(written.read_text())
    for side in ("live", "simulated"):
        metrics = result[side]["balancers"]["round_robin"]["metrics"]
        assert metrics["requests"]["mean"] == 10  # the first and the last tenth are not measured
        assert metrics["tpot_mean_ms"]["mean"] >= MOCK.base_ms
    assert result["live"]["balancers"]["round_robin"]["metrics"]["regret_us"]["mean"] is None  # nobody can look live
    assert shown.read_text().count("<svg") == shown.read_text().count("</svg>") > 5
    assert not client.keys("dpb:{replay-*")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--policy nobody", "no balancer 'nobody'"),
        ("--trace nowhere.csv", "nowhere.csv"),
        ("--ranks 0", "--ranks must be at least 1"),
        ("--speed 0", "--speed must be more than 0"),
        ("--dispatchers 33", "dispatchers must be 1 to 32"),
        ("--rate -1", "rate is -1"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_anything_starts(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *words.split()]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert "engine" not in said.out


@pytest.mark.parametrize("example", VERB.examples)
def test_every_example_parses(example: str) -> None:
    parser().parse_args(shlex.split(example)[2:])


def test_policies_take_turns_and_each_round_begins_with_another() -> None:
    class Watching:
        def __init__(self) -> None:
            self.order: list[tuple[int, str]] = []

        def play(self, policy: str, number: int, requests: list[TimedRequest]) -> Played:
            self.order.append((number, policy))
            names = [f"{policy}-{number}-{index}" for index in range(len(requests))]
            times = Times(served=[Served(name, 0, 5.0, 5.0, 5.1, 5.2) for name in names])
            step = {"t": 5.1, "duration_s": 0.1, "late_s": 0.0, "cost_ms": [100, 0], "held": [9, 0], "requests": [1, 0]}
            return Played(5.0, times, [step])

    words = "--requests 3 --rounds 3 --ranks 2 --policy round_robin --policy minimum_tokens"
    stage = Watching()
    play(plan_of(parser().parse_args(shlex.split(words))), stage, 1.0)  # type: ignore[arg-type]
    one, other = "round_robin", "minimum_tokens"
    assert stage.order == [(0, one), (0, other), (1, other), (1, one), (2, one), (2, other)]


def test_a_machine_too_slow_for_the_steps_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow:
        def __init__(self, what: str, **more: object) -> None: ...

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def play(self, policy: str, number: int, requests: list[TimedRequest]) -> Played:
            times = Times(served=[Served(f"{policy}-0-{index}", 0, 5.0, 5.0, 5.1, 5.2) for index in range(2)])
            step = {"t": 5.1, "duration_s": 0.1, "late_s": 0.05, "cost_ms": [50, 0], "held": [9, 0], "requests": [1, 0]}
            return Played(5.0, times, [step])

    monkeypatch.setattr("scheduler_hooks.replay.run.Stage", Slow)
    assert main(shlex.split("replay --requests 2 --rounds 1 --ranks 2 --warm-up 0 --policy round_robin")) == 0
    out = capsys.readouterr().out
    assert "late       50.0%" in out
    assert "give --speed 0.5 or less" in out


def test_the_simulator_has_the_mock_engines_price_list() -> None:
    cost = CostModel()
    assert (MOCK.base_ms, MOCK.kv_ns, MOCK.request_us) == (cost.base_ms, cost.kv_ns, cost.request_us)
    assert (MOCK.prefill_us, MOCK.kv_capacity_tokens) == (cost.prefill_us, KV_CAPACITY_TOKENS)
    assert MOCK.shared_request_us == MOCK.shared_prefill_us == MOCK.context_ns == 0


def test_a_step_costs_what_the_dearest_rank_pays_and_an_idle_rank_pays_nothing_of_its_own() -> None:
    cost = step_cost({"cost_ms": [30.0, 24.0, 0.0]}, base_ms=20.0)
    assert cost.duration_s == pytest.approx(0.030)
    assert cost.balanced_s == pytest.approx(0.020 + (0.010 + 0.004) / 3)
    steps = [{"late_s": 0.1, "duration_s": 0.4}, {"late_s": 0.0, "duration_s": 0.6}]
    assert late_share(Played(0.0, Times(), steps)) == pytest.approx(0.1)
