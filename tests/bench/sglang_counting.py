"""What counting costs a scheduler whose queue is long: SGLang's own `get_loads` over real requests of SGLang's.

    $ENGINES_HOME/sglang/bin/python -m tests.bench.sglang_counting

Run by SGLang's own python, without an engine. The queue is of `Req` objects with prompts of 1,000 tokens; what else
`get_loads` asks is answered by stand-ins, so the figures are the queue's part, which is what grows. It is CPU
time of the thread, which other work on the machine changes little.
"""

from __future__ import annotations

import statistics
import time
from array import array
from types import SimpleNamespace
from typing import Any

QUEUES = (0, 100, 1_000, 5_000)
ROUNDS = 200


def scheduler_with(waiting: int) -> Any:
    """As much of a scheduler as is counted, with SGLang's own inquirer and requests."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.load_inquirer import SchedulerLoadInquirer
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    queue = [Req(f"r{n}", "", array("q", [7] * 1_000), SamplingParams(max_new_tokens=8)) for n in range(waiting)]
    stats = SimpleNamespace(get_kv_token_stats=lambda: (0, 0.0))
    known = {
        "disaggregation_mode": DisaggregationMode.NULL,
        "max_total_num_tokens": 10**6,
        "max_running_requests": 64,
        "pool_stats_observer": SimpleNamespace(get_pool_stats=lambda: stats),
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        "get_running_batch": lambda: SimpleNamespace(reqs=[]),
        "get_waiting_queue": lambda: queue,
        "waiting_queue_prefix_matched": lambda: False,
        "get_recent_cache_hit_rate": lambda: 0.0,
        "get_stats": lambda: SimpleNamespace(
            **dict.fromkeys(("num_grammar_queue_reqs", "num_paused_reqs", "num_retracted_reqs"), 0),
            **dict.fromkeys(("kv_transfer_speed_gb_s", "kv_transfer_latency_ms", "gen_throughput"), 0.0),
            **dict.fromkeys(("cache_hit_rate", "utilization"), 0.0),
        ),
        "get_chunked_req": lambda: None,
        "get_total_prefill_uncached_tokens": lambda: 0,
        "get_total_prefill_busy_us": lambda: 0,
        "get_decode_moment_totals": lambda: (0,),
    }
    fields = {name: known.get(name) for name in SchedulerLoadInquirer.__dataclass_fields__}
    return SimpleNamespace(
        load_inquirer=SchedulerLoadInquirer(**fields),
        req_to_token_pool=SimpleNamespace(available_size=lambda: 64),
        chunked_req=None,
        server_args=SimpleNamespace(enable_streaming_session=False),
        disaggregation_mode=DisaggregationMode.NULL,
    )


def main() -> None:
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler_components import load_inquirer

    from scheduler_hooks.sglang.counting import Counting

    load_inquirer.get_parallel = lambda: SimpleNamespace(dp_rank=0)
    load_inquirer.get_lora = lambda: SimpleNamespace(enable_lora=False)
    assert runtime_context
    print(f"{'waiting requests':>18}{'p50 (CPU ms)':>14}{'p99 (CPU ms)':>14}")
    for waiting in QUEUES:
        counting = Counting(scheduler_with(waiting))
        took = []
        for _ in range(ROUNDS):
            began = time.thread_time()
            held = counting.held()
            took.append(1e3 * (time.thread_time() - began))
            assert held.tokens == 1_000 * waiting
        print(f"{waiting:>18,}{statistics.median(took):>14.3f}{statistics.quantiles(took, n=100)[98]:>14.3f}")


if __name__ == "__main__":
    main()
