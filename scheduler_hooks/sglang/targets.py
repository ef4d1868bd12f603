"""What of SGLang is hooked: by name, with the parameters that the hooks count on. Held against every release by a test.

SGLang only logs a target that it does not find, so `register` looks for all of them before it attaches to any.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from dataclasses import dataclass
from importlib import metadata

OLDEST, NEWEST = (0, 5, 13), (0, 5, 23)
"""Releases that the contract test has read; newer ones are tried, with a warning."""

CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
SYNC = "sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo"


@dataclass(frozen=True, slots=True)
class Target:
    """A method of SGLang: its dotted name, how it is hooked, and its first parameters after self."""

    path: str
    kind: str
    parameters: tuple[str, ...]


DISPATCH_ONE = Target(f"{CONTROLLER}.dispatching_with_trace", "around", ("req",))
DISPATCH_GENERATE = Target(f"{CONTROLLER}.dispatch_batch_generate", "around", ("batch_req",))
DISPATCH_EMBEDDING = Target(f"{CONTROLLER}.dispatch_batch_embedding", "around", ("batch_req",))
CONTROLLER_READY = Target(f"{CONTROLLER}.init_dispatcher", "after", ())
RECEIVED = Target(f"{SCHEDULER}.process_input_requests", "after", ("recv_reqs",))
STEPPED = Target(f"{SCHEDULER}.process_batch_result", "after", ("batch", "result"))
IDLE = Target(f"{SCHEDULER}.on_idle", "before", ())
SYNCED = Target(f"{SYNC}.all_gather", "after", ("device", "group"))

CONTROLLER_TARGETS = (DISPATCH_ONE, DISPATCH_GENERATE, DISPATCH_EMBEDDING, CONTROLLER_READY)
SCHEDULER_TARGETS = (RECEIVED, STEPPED, IDLE, SYNCED)
TARGETS = CONTROLLER_TARGETS + SCHEDULER_TARGETS


def version() -> str:
    """SGLang's; a build without tags says 0.0.0.dev0 or 0.1.dev7, and a fork may have another distribution's name."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def numbers(release: str) -> tuple[int, ...]:
    """The first three numbers of a release: (0, 5, 13) for 0.5.13.post1."""
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


def not_applied(targets: tuple[Target, ...]) -> list[str]:
    """Which of `targets` SGLang has not hooked after all; it only logs that."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [target.path for target in targets if target.path not in HookRegistry._patched]


def missing(targets: tuple[Target, ...]) -> list[str]:
    """Which of `targets` this SGLang does not have, or has with other parameters; imports the modules they are in."""
    problems = []
    for target in targets:
        try:
            function = pkgutil.resolve_name(target.path)
            given = tuple(inspect.signature(inspect.unwrap(function)).parameters)[1:]
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            problems.append(f"{target.path} ({type(error).__name__})")
            continue
        if given[: len(target.parameters)] != target.parameters:
            problems.append(f"{target.path} (takes {', '.join(given)})")
    return problems
