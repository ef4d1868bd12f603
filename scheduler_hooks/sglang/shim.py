"""SGLang 0.5.13 to 0.5.21 load no plugins in the controller's process; this makes them.

The main process starts the controller by a name in `sglang.srt.entrypoints.engine`. That name is set to
`run_controller`, which the spawned process imports from here, by our name. A hook on SGLang's function would not do:
the child unpickles the original.
"""

from __future__ import annotations

from typing import Any


def is_needed() -> bool:
    """Whether this SGLang's controller does not load plugins itself."""
    from sglang.srt.managers import data_parallel_controller

    return not hasattr(data_parallel_controller, "load_plugins")


def install() -> None:
    """Have the main process start the controller through `run_controller`."""
    from sglang.srt.entrypoints import engine

    engine.run_data_parallel_controller_process = run_controller


def run_controller(*args: Any, **kwargs: Any) -> Any:
    """The controller's process: plugins first, then SGLang's own function."""
    from sglang.srt.managers import data_parallel_controller
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return data_parallel_controller.run_data_parallel_controller_process(*args, **kwargs)
