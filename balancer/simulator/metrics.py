"""A run in a dozen numbers.

TTFT is from arrival to the first token (of a decode engine: the first that it makes). TPOT is a request's time from its
first to its last token by the tokens after the first; ITL the same over all requests' tokens, so long answers weigh
more. Barrier waste is the share of all step time that equal work on all ranks would remove. The ratios are largest by
mean over the ranks of an engine, weighted by time. Regret is how much longer a placement makes the next step than the
best rank would have, with everything held and on its way known; a mean over placements, NaN where none was looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from balancer.simulator.simulation import Run


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of the measured part of a run; see the module for the words."""

    requests: int
    steps: int
    ttft_mean_ms: float
    ttft_p99_ms: float
    tpot_mean_ms: float
    tpot_p99_ms: float
    itl_mean_ms: float
    requests_per_s: float
    output_tokens_per_s: float
    barrier_waste: float
    kv_max_mean: float
    requests_max_mean: float
    regret_us: float

    def as_json(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


def ttft_ms(run: Run) -> list[float]:
    """Of each measured request."""
    first, arrival = run.progress.first_token_s, run.stream.arrival_s
    return [(first[index] - arrival[index]) * 1e3 for index in measured(run)]


def tpot_ms(run: Run) -> list[float]:
    """Of each measured request with more than one token."""
    first, last, outputs = run.progress.first_token_s, run.progress.finished_s, run.stream.output_tokens
    return [(last[index] - first[index]) * 1e3 / (outputs[index] - 1) for index in measured(run) if outputs[index] > 1]


def measured(run: Run) -> range:
    """The requests that count."""
    return range(run.recorder.first_measured, run.recorder.last_measured + 1)


def quantile(sorted_values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, between neighbours in proportion; 0 for no values."""
    if not sorted_values:
        return 0.0
    at = share * (len(sorted_values) - 1)
    low = int(at)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (sorted_values[high] - sorted_values[low]) * (at - low)


def summary(run: Run) -> Summary:
    """The run's numbers."""
    recorder, indices = run.recorder, measured(run)
    first, last = run.progress.first_token_s, run.progress.finished_s
    outputs = run.stream.output_tokens
    ttft, tpot = sorted(ttft_ms(run)), sorted(tpot_ms(run))
    later_tokens = sum(outputs[index] - 1 for index in indices)
    span_s = max(last[index] for index in indices) - run.stream.arrival_s[indices[0]]
    return Summary(
        requests=len(indices),
        steps=recorder.steps,
        ttft_mean_ms=_mean(ttft),
        ttft_p99_ms=quantile(ttft, 0.99),
        tpot_mean_ms=_mean(tpot),
        tpot_p99_ms=quantile(tpot, 0.99),
        itl_mean_ms=sum(last[index] - first[index] for index in indices) * 1e3 / max(later_tokens, 1),
        requests_per_s=len(indices) / span_s,
        output_tokens_per_s=sum(outputs[index] for index in indices) / span_s,
        barrier_waste=recorder.waste_s / recorder.wall_s if recorder.wall_s else 0.0,
        kv_max_mean=recorder.kv_ratio_s / recorder.wall_s if recorder.wall_s else 1.0,
        requests_max_mean=recorder.request_ratio_s / recorder.wall_s if recorder.wall_s else 1.0,
        regret_us=recorder.regret_s * 1e6 / recorder.placements if recorder.placements else math.nan,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
