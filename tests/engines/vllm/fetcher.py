"""A KV connector whose KV takes some steps to come, for vLLM's scheduler alone: nothing is transferred.

Some prompts have part of their KV elsewhere; of these some wait for it outside of any step, some find it at once. So it
is on a decode rank of a disaggregated deployment, as far as its scheduler can see.
"""

from __future__ import annotations

import random
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

BLOCK = 16


class Nothing(KVConnectorMetadata):
    """What workers are told."""


class Fetcher(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's half; there is no other. `loading`: requests whose KV is on its way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loading: set[str] = set()
        self._dice = random.Random(3)
        self._waits: dict[str, bool] = {}

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens found elsewhere beyond those known here, and whether they come outside of steps."""
        left = request.num_prompt_tokens - num_computed_tokens
        tokens = min(self._dice.choice([0, 0, 32, 160, 900]), left - 1) // BLOCK * BLOCK
        if tokens <= 0:
            return 0, False
        return tokens, self._waits.setdefault(request.request_id, self._dice.random() < 0.7)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int, **more: Any) -> None:
        """Blocks wait for these tokens."""
        if num_external_tokens and self._waits[request.request_id]:
            self.loading.add(request.request_id)

    def come(self, dice: random.Random) -> set[str]:
        """Some of what is on its way has come."""
        here = {request_id for request_id in sorted(self.loading) if dice.random() < 0.3}
        self.loading -= here
        return here

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Nothing to tell."""
        return Nothing()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Its blocks are free."""
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...
