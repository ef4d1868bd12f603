"""Capacity at an objective, and what of a run counts."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest

from balancer.simulator import H200, Objective, Scenario, Stream, capacity_per_s, make_balancer, simulate, summary
from balancer.simulator.experiment import PATIENCE_MS
from balancer.simulator.progress import ProgressBar
from balancer.workload import TimedRequest, generate, scaled

SMALL = replace(H200, kv_capacity_tokens=20_000)
"""Room for about fifteen chats: more have to wait, and do not make a step longer."""


def streams(rate_per_s: float) -> Stream:
    """Chat for half a minute."""
    return Stream.of(scaled(generate(math.ceil(30 * rate_per_s), 1, 1.0), rate_per_s=rate_per_s))


def test_a_rate_at_which_requests_wait_for_ever_longer_is_no_capacity() -> None:
    scenario = Scenario(ranks=1, profile=SMALL, warm_up=0.2)
    # A token takes at most 21 ms, whatever the rate: what ends the capacity is the queue.
    found = capacity_per_s("minimum_tokens", scenario, streams, Objective(tpot_p99_ms=50), 1.0, precision=0.05)
    assert 2 < found < 16
    overloaded = summary(simulate(streams(2 * found), scenario, make_balancer("minimum_tokens")))
    assert overloaded.tpot_p99_ms < 50
    assert overloaded.ttft_p99_ms > PATIENCE_MS


def test_what_is_far_above_the_rate_asked_about_is_not_looked_for() -> None:
    one = Stream.of([TimedRequest(0.0, 10, 2)])
    assert capacity_per_s("round_robin", Scenario(ranks=1), lambda rate: one, Objective(), 1.0) == math.inf


def test_all_of_a_run_counts_where_all_requests_come_at_once() -> None:
    stream = Stream.of(scaled(generate(40, 1, 1.0), rate_per_s=math.inf))
    shares = Scenario(ranks=2, warm_up=0.25, cool_down=0.1)
    whole = simulate(stream, replace(shares, warm_up=0.0, cool_down=0.0), make_balancer("minimum_tokens"))
    cut = simulate(stream, shares, make_balancer("minimum_tokens"))
    assert summary(cut).steps == summary(whole).steps == pytest.approx(max(stream.output_tokens), abs=1)
    assert summary(cut).barrier_waste == summary(whole).barrier_waste > 0


def test_a_terminal_sees_how_far_a_run_is_and_a_file_sees_nothing() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        bar = ProgressBar("searching capacities", "balancers", stream)
        bar.tell(1, 4)
        bar.end()
    assert terminal.getvalue() == "\rsearching capacities [########........................] 1 of 4 balancers\r\x1b[K"
    assert file.getvalue() == ""
