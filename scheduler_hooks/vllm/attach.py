"""What vLLM calls in each of its processes: find out what is there, attach to it, and say so in one line.

Wraps of names that vLLM looks up when it needs them, so that nothing has to be passed on its command line:
`SchedulerConfig.get_scheduler_cls`, by which an EngineCore gets its scheduler's class, and, with
DP_BALANCER_DISPATCH=1, `DPLBAsyncMPClient.add_request_async`, by which an API server sends a request to one of several
EngineCores, with `AsyncLLM.add_request`, which registers the request before.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from scheduler_hooks.plugin import PluginSettings
from scheduler_hooks.step_hook import StepHook
from scheduler_hooks.vllm.counts import Counts
from scheduler_hooks.vllm.dispatching import InsideDispatcher, dispatching
from scheduler_hooks.vllm.environment import agree_on_engine, log_as_vllm
from scheduler_hooks.vllm.registering import registering
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
        engine, version = agree_on_engine(os.environ, sys.argv), _version()
    except Exception as error:
        log.error("dp-balancer is off, vLLM goes on without: %s", error or repr(error))
        return
    attached: list[str] = []
    refused: list[str] = []
    if plugin.hook:
        why = _tried(_attach_hook, plugin, engine)
        refused += [f"loads are NOT reported: {why}"] if why else []
        attached += [] if why else ["schedulers report their loads"]
    if plugin.dispatch:
        why = _tried(_attach_dispatcher, plugin, engine) if attached else "nobody would acknowledge what they book"
        refused += [f"API servers do NOT dispatch: {why}"] if why else []
        attached += [] if why else ["API servers dispatch by the pool"]
    log.log(
        logging.ERROR if refused else logging.INFO,
        "dp-balancer in vLLM %s, engine %s of pool %s: %s",
        version,
        engine,
        plugin.settings.pool,
        "; ".join(attached + refused) or "switched off",
    )


def _version() -> str:
    import vllm

    return getattr(vllm, "__version__", "of unknown version")


def _tried(attach: Callable[[PluginSettings, str], list[str]], plugin: PluginSettings, engine: str) -> str:
    """Attach; why it could not be, or nothing."""
    try:
        lacks = attach(plugin, engine)
    except Exception as error:
        return str(error) or repr(error)
    return f"this version has no {', '.join(lacks)}" if lacks else ""


def _attach_hook(plugin: PluginSettings, engine: str) -> list[str]:
    """Wrap the choice of a scheduler's class; what this version lacks for it."""
    from vllm.config import ParallelConfig, SchedulerConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    lacks = [f"Scheduler.{name}" for name in NEEDED if not hasattr(Scheduler, name)]
    if not hasattr(SchedulerConfig, "get_scheduler_cls"):
        lacks.append("SchedulerConfig.get_scheduler_cls")
    if "data_parallel_index" not in ParallelConfig.__dataclass_fields__:
        lacks.append("ParallelConfig.data_parallel_index")
    if lacks:
        return lacks
    if plugin.form == "gather":
        log.warning("DP_BALANCER_FORM=gather is not for vLLM: each of its ranks reports alone")
    if plugin.every != 1:
        log.warning("DP_BALANCER_EVERY is not for vLLM: an idle rank's last counts would wait for ever")
    get_scheduler_cls = SchedulerConfig.get_scheduler_cls
    if not hasattr(get_scheduler_cls, _MARK):
        made: dict[type, type] = {}

        def begin(scheduler: Any) -> Counts:
            return _begin(scheduler, plugin, engine)

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
    return []


def _begin(scheduler: Any, plugin: PluginSettings, engine: str) -> Counts:
    log_as_vllm()
    index = scheduler.vllm_config.parallel_config.data_parallel_index
    capacity = getattr(scheduler.cache_config, "kv_cache_size_tokens", None) if plugin.capacity else None
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
    fetches = getattr(scheduler, "connector", None) is not None
    return Counts(scheduler.requests, hook, lambda: scheduler.kv_cache_manager.usage, fetches)


def _attach_dispatcher(plugin: PluginSettings, engine: str) -> list[str]:
    """Wrap the sending of a request; what this version lacks for it."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    fields = getattr(EngineCoreRequest, "__struct_fields__", ())
    needed = ("request_id", "prompt_token_ids", "prompt_embeds", "pooling_params", "resumable", "data_parallel_rank")
    lacks = [f"EngineCoreRequest.{name}" for name in needed if name not in fields]
    if not hasattr(DPLBAsyncMPClient, "add_request_async"):
        lacks.append("DPLBAsyncMPClient.add_request_async")
    if lacks:
        return lacks
    send = DPLBAsyncMPClient.add_request_async
    if not hasattr(send, _MARK):
        if unseen := _attach_registering():
            log.warning(
                "a client that goes while the pool is asked leaves its request in the API server: "
                "this version has no %s",
                ", ".join(unseen),
            )
        wrapped = dispatching(send, lambda: _begin_dispatcher(plugin, engine))
        setattr(wrapped, _MARK, send)
        DPLBAsyncMPClient.add_request_async = wrapped
    return []


def _attach_registering() -> list[str]:
    """Wrap the registering of a request, so that it can be undone; what this version lacks for it."""
    try:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.output_processor import OutputProcessor
    except ImportError as error:
        return [error.name or str(error)]
    lacks = []
    if not inspect.iscoroutinefunction(getattr(AsyncLLM, "add_request", None)):
        lacks.append("AsyncLLM.add_request")
    if not hasattr(OutputProcessor, "has_request"):
        lacks.append("OutputProcessor.has_request")
    abort_requests = getattr(OutputProcessor, "abort_requests", None)
    if abort_requests is None or "internal" not in inspect.signature(abort_requests).parameters:
        lacks.append("OutputProcessor.abort_requests(internal)")
    if not lacks and not hasattr(AsyncLLM.add_request, _MARK):
        wrapped = registering(AsyncLLM.add_request)
        setattr(wrapped, _MARK, AsyncLLM.add_request)
        AsyncLLM.add_request = wrapped
    return lacks


def _begin_dispatcher(plugin: PluginSettings, engine: str) -> InsideDispatcher:
    log_as_vllm()  # again: vLLM's first process calls `register` before it has set up its own log
    begun = InsideDispatcher(plugin.settings, engine)
    log.info("this API server's requests are placed by pool %s on the ranks of %s", plugin.settings.pool, engine)
    return begun
