"""Command line of the mock engine: `python -m scheduler_hooks.mock_engine --ranks 16 --pool demo`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from balancer import InvalidInput, Settings
from scheduler_hooks.mock_engine.cost import CostModel
from scheduler_hooks.mock_engine.engine import HOST, EngineSettings, run
from scheduler_hooks.mock_engine.hook import HookSettings
from scheduler_hooks.mock_engine.scheduler import CHUNK_TOKENS, KV_CAPACITY_TOKENS

_EPILOG = """\
When all ranks have made their first step, one line of JSON on stdout says where they listen:
  {"ready": true, "engine": …, "address": "127.0.0.1:PORT", "ranks": N, "rank_ports": […], "pids": […]}
Requests are lines of JSON on a rank's port: {"request_id": "r1", "input_tokens": 900, "output_tokens": 120}.

SIGTERM, SIGINT or the end of the parent process end it.
Exit codes: 0 stopped, 1 a rank died or a port or file could not be had, 2 wrong arguments."""


def parse(arguments: Sequence[str] | None = None) -> EngineSettings:
    """Read the command line; exits with code 2 on a wrong one."""
    cost = CostModel()
    parser = argparse.ArgumentParser(
        prog="python -m scheduler_hooks.mock_engine",
        description="A mock LLM engine for demos and tests: ranks that step together and compute nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--ranks", type=_count, default=16, metavar="N", help="rank processes (default 16)")
    engine.add_argument("--engine", default="mock-0", metavar="NAME", help="name of this engine (default mock-0)")
    engine.add_argument("--port", type=int, default=0, help="port of rank 0, others follow (default 0: any)")
    engine.add_argument(
        "--host", default=HOST, help="name that reaches it from other machines; without it, it listens on loopback only"
    )
    engine.add_argument(
        "--speed", type=_positive, default=1.0, metavar="F", help="steps run F times as fast (default 1)"
    )
    engine.add_argument("--stats", type=Path, metavar="FILE", help="append a JSON line per step that had work")
    hook = parser.add_argument_group("hook")
    hook.add_argument("--no-hook", action="store_true", help="report nothing to Redis")
    hook.add_argument("--pool", default="demo", help="pool to report to (default demo)")
    hook.add_argument("--redis", metavar="URL", help="where Redis is (default: from the environment)")
    hook.add_argument(
        "--form",
        choices=("gather", "leader"),
        default="gather",
        help="gather to rank 0 (default), or each rank reports",
    )
    hook.add_argument("--every", type=_count, default=1, metavar="N", help="report every N steps (default 1)")
    hook.add_argument("--tell-capacity", action="store_true", help="tell the pool what --kv-capacity is")
    model = parser.add_argument_group("hardware and model")
    model.add_argument(
        "--kv-capacity",
        type=_count,
        default=KV_CAPACITY_TOKENS,
        metavar="TOKENS",
        help="KV pool of a rank (default %(default)s)",
    )
    model.add_argument(
        "--chunk",
        type=_count,
        default=CHUNK_TOKENS,
        metavar="TOKENS",
        help="prefill per rank and step (default %(default)s)",
    )
    model.add_argument("--base-ms", type=_positive, default=cost.base_ms, help="cost of any step (default %(default)s)")
    model.add_argument(
        "--prefill-us",
        type=_positive,
        default=cost.prefill_us,
        help="per prefilled token (default %(default)s)",
    )
    model.add_argument(
        "--kv-ns",
        type=_positive,
        default=cost.kv_ns,
        help="per KV token read by decoding (default %(default)s)",
    )
    model.add_argument(
        "--request-us",
        type=_positive,
        default=cost.request_us,
        help="per request of a batch (default %(default)s)",
    )
    model.add_argument(
        "--idle-tick-ms",
        type=_positive,
        default=100.0,
        help="length of a step without work, unless a request ends it (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    return EngineSettings(
        name=options.engine,
        ranks=options.ranks,
        port=options.port,
        host=options.host,
        speed=options.speed,
        idle_tick_ms=options.idle_tick_ms,
        kv_capacity_tokens=options.kv_capacity,
        chunk_tokens=options.chunk,
        cost=CostModel(options.base_ms, options.prefill_us, options.kv_ns, options.request_us),
        hook=None if options.no_hook else _hook(parser, options),
        stats=options.stats,
    )


def _hook(parser: argparse.ArgumentParser, options: argparse.Namespace) -> HookSettings:
    try:
        return HookSettings(
            options.engine,
            Settings.from_environment(url=options.redis, pool=options.pool),
            options.form,
            options.every,
            options.kv_capacity if options.tell_capacity else None,
        )
    except InvalidInput as error:
        parser.error(str(error))


def main() -> int:
    """Run the engine that the command line describes."""
    settings = parse()
    try:
        return run(settings)
    except OSError as error:
        print(f"mock engine: {error}", file=sys.stderr)
        return 1


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
