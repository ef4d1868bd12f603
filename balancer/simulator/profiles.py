"""What a step costs on which hardware: the price lists of the simulator, and where each number comes from.

Pure numbers. A rank's own cost is linear in what it runs; the barrier makes the dearest rank's cost that of all; what
is shared out over all ranks (the routed experts) is paid by the mean:

    step = base + max over ranks(kv + request + prefill + context) + shared_request x mean requests
                + shared_prefill x mean prefill tokens

Both profiles stand for DeepSeek-V3/R1 in FP8 with DP attention and expert parallelism over 16 GPUs. They have the
right proportions and predict no deployment. Of the model (DeepSeek-V3 report, arXiv 2412.19437): 37e9 active of 671e9
parameters, routed experts 55 % of the active ones; 61 layers, 128 heads, MLA with 576 values of 2 bytes a token and
layer, 70,272 bytes a token; decode attention with absorbed weights 2 x (576 + 512) x 128 x 61 = 17.0e6 FLOP per KV
token, prefill attention 2 x (192 + 128) x 128 x 61 = 5.0e6 FLOP per pair of tokens.

H200 (NVIDIA data sheet: 4.8 TB/s, 989 TFLOPS BF16, 1,979 FP8, 141 GB)
  base 20 ms          60 GB of weights read (12 ms) and two all-to-alls in each of 58 expert layers
  kv 20 ns            70,272 bytes at 3.5 TB/s; FlashMLA's README: 3.0 of 3.35 TB/s on H800 (by compute, at the 660
                      TFLOPS that it reaches at best, it would be 26)
  request 30 us       45 % of 2 x 37e9 FLOP at 60 % of FP8 (28 us); 1,500 KV tokens' worth
  shared request 0    experts of up to 400 tokens a rank are bound by reading weights, which is in the base
  prefill 70 + 83 us  LMSYS, "Large-scale EP" (2025-05-05): 52,300 input tokens/s on 8 H100, 153 us per token and GPU
                      with all ranks busy, 45 % of it a rank's own
  context 8.3 ns      5.0e6 FLOP at 600 TFLOPS, FlashAttention-3's class (arXiv 2407.08608: 740 at best on H100)
  KV pool 700,000     of 141 GB about 60 weights and 30 buffers
  Check: 88 requests of 4,989 KV tokens: 31 ms; DeepSeek's "Inference System Overview" has 45 to 50 ms on H800.

H20 (296 TFLOPS FP8, 148 BF16, 96 GB, 4.0 TB/s: LMSYS and Ant Group, "Serving DeepSeek-R1 on H20-96G", 2025-09-26)
  base 25 ms          60 GB at 4.0 TB/s (15 ms) and the all-to-alls
  kv 115 ns           bound by compute (242 FLOP a byte, the ridge is at 37): 17.0e6 FLOP at the BF16 peak of 148
                      TFLOPS; an assumption: FlashMLA-FP8, which that report uses, gets there by doing part in FP8
  request 190 us      45 % of 2 x 37e9 FLOP at 60 % of FP8; 1,650 KV tokens' worth
  shared request 230 us  the other 55 %, bound by compute from 74 tokens on
  prefill 220 + 265 us   16,500 input tokens/s on 8 GPUs in that report: 485 us per token and GPU
  context 42 ns       5.0e6 FLOP at 80 % of 148 TFLOPS
  KV pool 250,000     of 96 GB about 60 weights and 18 buffers
  Check: 48 requests of 4,600 KV tokens: 71 ms, 680 tokens/s and GPU; the report has 5,700 on 8 GPUs, 713 each, for
  4,096 input tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Profile:
    """Price list of a step; see the module's docstring for the formula and the sources.

    `kv_ns` per KV token attended, `context_ns` per prefilled token and token before it, the rest as they say.
    """

    name: str
    base_ms: float
    kv_ns: float
    request_us: float
    shared_request_us: float
    prefill_us: float
    shared_prefill_us: float
    context_ns: float
    kv_capacity_tokens: int

    def rank_ms(self, kv_tokens: float, requests: float) -> float:
        """What decoding costs this rank alone, in ms, the base not counted."""
        return kv_tokens * self.kv_ns / 1e6 + requests * self.request_us / 1e3

    @property
    def request_kv_tokens(self) -> float:
        """How many KV tokens cost as much as one request."""
        return self.request_us * 1e3 / self.kv_ns


H200 = Profile(
    name="h200",
    base_ms=20.0,
    kv_ns=20.0,
    request_us=30.0,
    shared_request_us=0.0,
    prefill_us=70.0,
    shared_prefill_us=83.0,
    context_ns=8.3,
    kv_capacity_tokens=700_000,
)

H20 = Profile(
    name="h20",
    base_ms=25.0,
    kv_ns=115.0,
    request_us=190.0,
    shared_request_us=230.0,
    prefill_us=220.0,
    shared_prefill_us=265.0,
    context_ns=42.0,
    kv_capacity_tokens=250_000,
)

MOCK = replace(H200, name="mock", shared_prefill_us=0.0, context_ns=0.0)
"""The price list of `scheduler_hooks.mock_engine`, which shares out nothing and takes no time for what came before."""

PROFILES = {profile.name: profile for profile in (H200, H20, MOCK)}
"""Profiles by name."""
