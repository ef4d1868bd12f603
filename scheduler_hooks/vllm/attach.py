"""What vLLM calls in each of its processes: find out what is there, attach to it, and say so in one line.

Two wraps of names that vLLM looks up when it needs them, so that nothing has to be passed on its command line:
`SchedulerConfig.get_scheduler_cls`, by which an EngineCore gets its scheduler's class, and, with
DP_BALANCER_DISPATCH=1, `DPLBAsyncMPClient.add_request_async`, by which an API server sends a request to one of several
EngineCores.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from importlib.metadata import version
from typing import Any

from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.step_hook import StepHook
from scheduler_hooks.vllm.counts import Counts
from scheduler_hooks.vllm.dispatching import InsideDispatcher, dispatching
from scheduler_hooks.vllm.environment import agree_on_engine, log_as_vllm, wants_capacity
from scheduler_hooks.vllm.scheduler import NEEDED, reporting

log = logging.getLogger("scheduler_hooks.vllm")

_MARK = "_dp_balancer_wraps"


def register() -> None:
    """The entry point. Never raises: vLLM would end."""
    try:
        plugin = PluginSettings.from_environment()
        if plugin is None:
            return
        log_as_vllm()
        engine = agree_on_engine(os.environ, sys.argv)
        attached = []
        if plugin.hook:
            attached.append(_attach_hook(plugin, engine))
        if plugin.dispatch:
            attached.append(_attach_dispatcher(plugin, engine))
        log.info(
            "dp-balancer in vLLM %s, engine %s of pool %s: %s",
            version("vllm"),
            engine,
            plugin.settings.pool,
            "; ".join(attached) or "switched off",
        )
    except Exception as error:
        log.error("dp-balancer is off, vLLM goes on without: %s", error or repr(error))


def _attach_hook(plugin: PluginSettings, engine: str) -> str:
    from vllm.config import ParallelConfig, SchedulerConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    lacks = [f"Scheduler.{name}" for name in NEEDED if not hasattr(Scheduler, name)]
    if not hasattr(SchedulerConfig, "get_scheduler_cls"):
        lacks.append("SchedulerConfig.get_scheduler_cls")
    if "data_parallel_index" not in ParallelConfig.__dataclass_fields__:
        lacks.append("ParallelConfig.data_parallel_index")
    if lacks:
        return f"loads are NOT reported, this version has no {', '.join(lacks)}"
    if plugin.form == "gather":
        log.warning("DP_BALANCER_FORM=gather is not for vLLM: each of its ranks reports alone")
    if plugin.every != 1:
        log.warning("DP_BALANCER_EVERY is not for vLLM: an idle rank's last counts would wait for ever")
    get_scheduler_cls = SchedulerConfig.get_scheduler_cls
    if not hasattr(get_scheduler_cls, _MARK):
        takes_capacity = wants_capacity(os.environ)
        made: dict[type, type] = {}

        def begin(scheduler: Any) -> Counts:
            return _begin(scheduler, plugin, engine, takes_capacity)

        @functools.wraps(get_scheduler_cls)
        def wrapped(config: Any) -> type:
            found: type = get_scheduler_cls(config)
            try:
                return made.get(found) or made.setdefault(found, reporting(found, begin))
            except Exception as error:
                log.error("loads are not reported, scheduler %r: %r", found, error)
                return found

        setattr(wrapped, _MARK, get_scheduler_cls)
        SchedulerConfig.get_scheduler_cls = wrapped
    return "schedulers report their loads"


def _begin(scheduler: Any, plugin: PluginSettings, engine: str, takes_capacity: bool) -> Counts:
    log_as_vllm()
    index = scheduler.vllm_config.parallel_config.data_parallel_index
    capacity = getattr(scheduler.cache_config, "kv_cache_size_tokens", None) if takes_capacity else None
    hook = StepHook.leading(
        plugin.settings, engine=engine, index=index, address=plugin.address, capacity_tokens=capacity
    )
    log.info(
        "%s is rank %s/%d of pool %s%s",
        type(scheduler).__name__,
        engine,
        index,
        plugin.settings.pool,
        f", capacity {capacity:,} tokens" if capacity else "",
    )
    return Counts(scheduler.requests, hook)


def _attach_dispatcher(plugin: PluginSettings, engine: str) -> str:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    fields = getattr(EngineCoreRequest, "__struct_fields__", ())
    needed = ("request_id", "prompt_token_ids", "prompt_embeds", "pooling_params", "resumable", "data_parallel_rank")
    lacks = [f"EngineCoreRequest.{name}" for name in needed if name not in fields]
    if not hasattr(DPLBAsyncMPClient, "add_request_async"):
        lacks.append("DPLBAsyncMPClient.add_request_async")
    if lacks:
        return f"API servers do NOT dispatch, this version has no {', '.join(lacks)}"
    send = DPLBAsyncMPClient.add_request_async
    if not hasattr(send, _MARK):
        wrapped = dispatching(send, lambda: _begin_dispatcher(plugin, engine))
        setattr(wrapped, _MARK, send)
        DPLBAsyncMPClient.add_request_async = wrapped
    return "API servers dispatch by the pool"


def _begin_dispatcher(plugin: PluginSettings, engine: str) -> InsideDispatcher:
    log_as_vllm()  # again: vLLM's first process calls `register` before it has set up its own log
    log.info("this API server's requests are placed by pool %s on the ranks of %s", plugin.settings.pool, engine)
    return InsideDispatcher(plugin.settings, engine)
