"""What a step costs: the mock's stand-in for the GPU.

Pure arithmetic over what one rank runs in one step; no clock, no sockets. `scheduler` describes the work,
`rank` asks for its price, `barrier` takes the dearest rank's price as the step of all.

The defaults stand for a DeepSeek-V3-like model on 16 H200 with DP attention and expert parallelism. They
are rounded from public figures and meant to have the right proportions, not to predict a deployment:

* KV tokens, 20 ns each: MLA keeps 576 values of 2 bytes in each of 61 layers (DeepSeek-V3 report, arXiv
  2412.19437), 70,272 bytes a token, read once per decode step; 20 ns is 3.5 TB/s of the H200's 4.8 TB/s
  (NVIDIA data sheet). FlashMLA's README reports 3.0 of 3.35 TB/s on H800.
* Requests, 30 us each: 1,500 KV tokens' worth, the middle of the 900 to 2,200 that this project's design
  found for H20/H200-class hardware.
* Every step, 20 ms: reading the weights (about 60 of 141 GB per GPU: 12 ms) and two all-to-alls in each of
  58 expert layers. Check: with 88 requests of 4,989 KV tokens per GPU a step takes 31 ms; DeepSeek's
  "Inference System Overview" gives that load as 20 to 22 tokens/s per request, 45 to 50 ms, on the slower
  H800.
* Prefill tokens, 70 us each: LMSYS reports 52,300 input tokens/s per node of 8 H100 ("Large-scale EP",
  2025-05-05), 153 us per token and GPU with all ranks busy. The routed experts, 55 % of the active
  parameters, are shared out over all ranks, so a rank that prefills alone is charged the other 45 %.
"""

from __future__ import annotations

from dataclasses import dataclass

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one rank runs in one step: a prefill batch or a decode batch, as SGLang without mixed chunks.

    `prefill_tokens` are computed in this step, `kv_tokens` are read by decoding requests, `requests` is the
    batch size.
    """

    prefill_tokens: int = 0
    kv_tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Price list of a step, see the module's docstring for where the numbers come from."""

    base_ms: float = 20.0
    prefill_us: float = 70.0
    kv_ns: float = 20.0
    request_us: float = 30.0

    def step_ms(self, work: StepWork) -> float:
        """Milliseconds that `work` would take this rank alone; 0 for a rank with nothing to do."""
        if not work.requests:
            return 0.0
        return (
            self.base_ms
            + work.prefill_tokens * self.prefill_us / 1e3
            + work.kv_tokens * self.kv_ns / 1e6
            + work.requests * self.request_us / 1e3
        )
