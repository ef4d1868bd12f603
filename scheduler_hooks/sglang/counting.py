"""What a scheduler holds, read off its own objects; the one place that knows how SGLang's releases spell things.

`LoadSnapshot.num_total_tokens` is what SGLang balances by itself: KV tokens in use and the tokens of all queued
requests. It lacks one thing: a prompt that is prefilled in chunks has left the queue, and only the chunks done so far
are in the KV pool, so the rank that is busiest with a long prompt looks idlest. What has no KV yet is added here.

In PD disaggregation this stays the count: a decode rank's tokens count from the moment it has received the request,
also while their KV is still on its way (SGLang's `num_active_tokens` leaves these out, and a burst would herd).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Held(NamedTuple):
    """Tokens and requests of a rank; of the tokens those that have no KV yet; the KV tokens in use, in thousandths."""

    tokens: int
    requests: int
    pending_tokens: int
    kv_permille: int


class Counting:
    """Counts of one scheduler. Make it before the scheduler's first batch: an idle pool is what it compares with."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._rows = scheduler.req_to_token_pool.available_size()

    @property
    def is_decode(self) -> bool:
        """Whether this is the decode side of PD disaggregation now: a server may switch (--enable-pd-role-switch)."""
        return getattr(getattr(self._scheduler, "disaggregation_mode", None), "name", "NULL") == "DECODE"

    def held(self) -> Held:
        """What this rank holds now, running and queued."""
        scheduler = self._scheduler
        loads = scheduler.load_inquirer.get_loads()
        used, capacity = loads.num_used_tokens, loads.max_total_num_tokens
        tokens = loads.num_total_tokens + to_prefill(scheduler.chunked_req)
        requests = self._with_a_row() + self._without_a_row(loads)
        return Held(tokens, requests, max(0, tokens - used), min(1_000, 1_000 * used // max(1, capacity)))

    def _with_a_row(self) -> int:
        """Requests that have a row in the pool: from their first chunk to their end, on a prefill server to the end of
        their transfer, on a decode server from before it.

        SGLang's own count of the running lacks those that are in their first step and in no batch yet, with pipeline
        parallelism all micro-batches but one, and a prefill server's is always 0.
        """
        rows: int = self._rows - self._scheduler.req_to_token_pool.available_size()
        return max(0, rows - idle_rows(self._scheduler))

    def _without_a_row(self, loads: Any) -> int:
        """Requests that wait for one; on a decode server those that wait for their KV or are computed have theirs."""
        if not self.is_decode:
            return int(loads.num_waiting_reqs)
        queue = self._scheduler.disagg_decode_prealloc_queue
        return len(queue.queue) + len(queue.retracted_queue)

    def capacity_tokens(self) -> int:
        """Tokens for which this rank has KV memory."""
        return int(self._scheduler.load_inquirer.get_loads().max_total_num_tokens)

    def waiting_for_grammar(self) -> set[str]:
        """Ids of requests whose grammar is being compiled: SGLang counts their tokens nowhere until it is."""
        manager = getattr(self._scheduler, "grammar_manager", None)
        return {request.rid for request in getattr(manager, "grammar_queue", ())}


def idle_rows(scheduler: Any) -> int:
    """Rows that streaming sessions keep while none of their turns is computed."""
    if not getattr(scheduler.server_args, "enable_streaming_session", False):
        return 0
    kept: int = scheduler.pool_stats_observer.session_held_req_count()  # those of computed turns too
    if not kept:
        return 0
    # From 0.5.22 on a session has its row from the start of its first turn, before from the end of it.
    has_from_start = hasattr(scheduler.tree_cache, "session_records")
    waiting = {request.session.session_id for request in scheduler.waiting_queue if request.session}
    computed: int = sum(
        session._inflight and id_ not in waiting and (has_from_start or bool(session.req_nodes))
        for id_, session in scheduler.session_controller.sessions.items()
    )
    return max(0, kept - computed)


def to_prefill(chunked: Any) -> int:
    """Tokens of a request prefilled in chunks that have no KV yet; 0 for None."""
    if chunked is None:
        return 0
    kept = getattr(chunked, "kv", None)
    allocated = chunked.kv_allocated_len if kept is None else kept.kv_allocated_len
    return max(0, int(chunked.seqlen) - int(allocated))


def tokens_of(request: Any) -> int:
    """Prompt tokens of a tokenized request, at least 1."""
    ids = getattr(request, "input_ids", None)
    if ids is None:
        ids = getattr(request, "input_embeds", None)
    return max(1, len(ids) if ids is not None else 1)


def tokenized(messages: Any) -> list[Any]:
    """The requests among a scheduler's messages, those inside batches too; control messages and probes left out."""
    found = []
    for message in messages or ():
        batch = getattr(message, "batch", None)
        for request in batch if isinstance(batch, list | tuple) else (message,):
            if hasattr(request, "input_ids") and is_users(request):
                found.append(request)
    return found


def is_users(request: Any) -> bool:
    """Whether a person's request, with an id: not one of SGLang's own probes."""
    rid = getattr(request, "rid", None)
    return isinstance(rid, str) and bool(rid) and not rid.startswith(PROBE)


PROBE = "HEALTH_CHECK"


def led_rank(scheduler: Any) -> int | None:
    """Index of the DP rank that this process speaks for; None where another process of the rank does."""
    writer = getattr(scheduler, "load_snapshot_writer", None)
    if writer is not None:
        return int(writer.dp_rank)
    if getattr(scheduler, "recv_from_tokenizer", None) is None:
        channels = getattr(scheduler, "ipc_channels", None)
        if getattr(channels, "recv_from_tokenizer", None) is None:
            return None
    rank = getattr(scheduler, "dp_rank", None)
    if rank is None:
        from sglang.srt import runtime_context

        rank = runtime_context.get_parallel().dp_rank
    return int(rank or 0)


def active_ranks(controller: Any) -> list[int]:
    """Ranks to which SGLang's controller may send now; to any other it would raise, which ends the server."""
    workers = controller.workers
    active = getattr(controller, "_active_workers", None)
    active = range(len(workers)) if active is None else active
    return [index for index in active if workers[index] is not None and controller.status[index]]
