"""The entry point: SGLang calls `register` in each of its processes, before anything else is there.

It attaches or it says why not; it never raises. Which process this is shows only later, so all hooks are registered
everywhere, and those of the controller wake up in the controller.
"""

from __future__ import annotations

import logging

from balancer import BalancerError
from scheduler_hooks.once import Once
from scheduler_hooks.plugin import PluginSettings, harmless
from scheduler_hooks.sglang import shim, targets
from scheduler_hooks.sglang.dispatching import Dispatching
from scheduler_hooks.sglang.scheduling import Scheduling
from scheduler_hooks.sglang.targets import Target

log = logging.getLogger("scheduler_hooks.sglang")


def register() -> None:
    """Attach dp-balancer to the SGLang that called, as the environment says (`scheduler_hooks.plugin`)."""
    harmless(Once(log), "attaching dp-balancer to SGLang")(_register)()


def _register() -> None:
    try:
        plugin = PluginSettings.from_environment()
    except BalancerError as error:
        return log.error("dp-balancer is off: %s", error)
    if plugin is None:
        return None
    version = targets.version()
    number = targets.numbers(version)
    if (0, 0, 0) < number < targets.OLDEST and "dev" not in version:
        return log.error("dp-balancer is off: it needs SGLang %s or newer, not %s", _dotted(targets.OLDEST), version)
    absent = targets.missing(targets.TARGETS)
    if absent:
        return log.error("dp-balancer is off: SGLang %s has no %s", version, "; no ".join(absent))
    if number > targets.NEWEST:
        log.warning("dp-balancer knows SGLang up to %s; %s has what it needs", _dotted(targets.NEWEST), version)
    if plugin.hook:
        _hook_scheduler(Scheduling(plugin))
    if plugin.dispatch is not False and plugin.hook:
        if shim.is_needed():
            shim.install()
        _hook_controller(Dispatching(plugin))
    elif plugin.dispatch:
        log.error("dp-balancer places nothing here: DP_BALANCER_HOOK=0, and nobody would acknowledge what it books")
    return None


def _hook_scheduler(scheduling: Scheduling) -> None:
    _hook(targets.RECEIVED, scheduling.received)
    _hook(targets.STEPPED, scheduling.stepped)
    _hook(targets.IDLE, scheduling.idle)
    _hook(targets.SYNCED, scheduling.synced)


def _hook_controller(dispatching: Dispatching) -> None:
    _hook(targets.CONTROLLER_READY, dispatching.ready)
    _hook(targets.DISPATCH_ONE, dispatching.one)
    _hook(targets.DISPATCH_GENERATE, dispatching.batch)
    _hook(targets.DISPATCH_EMBEDDING, dispatching.batch)


def _hook(target: Target, function: object) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target.path, function, HookType[target.kind.upper()])


def _dotted(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
