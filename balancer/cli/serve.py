"""`balancer serve`: a dispatcher replica that speaks OpenAI and places every request on a rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from balancer.cli.exits import Exit
from balancer.cli.verb import Verb, add_address, add_pool_option
from balancer.embedded import EmbeddedRedis
from balancer.errors import InvalidInput
from balancer.serve.options import MIB, Engine, Limits, Options, checked_engines, parse_engine
from balancer.settings import Settings, redacted

_NEEDED = ("httptools", "prometheus_client")
_KEY_VARIABLE, _ENGINE_KEY_VARIABLE = "DP_BALANCER_API_KEY", "DP_BALANCER_ENGINE_KEY"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address(parser)
    add_pool_option(parser)
    add = parser.add_argument
    add("--engine", action="append", default=[], metavar="URL[,...]", help="an engine; see above; repeat for each")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8080, metavar="N", help="port to listen on, 0 for a free one (default: 8080)")
    add("--workers", type=int, default=1, metavar="N", help="processes on the port, each a replica (default: 1)")
    add("--tokenizer", metavar="PATH", help="tokenizer.json or its folder: prompts are counted, not estimated")
    add(
        "--redis-away",
        choices=("last_known", "engine"),
        default="last_known",
        help="while Redis is away: place by the last known loads, or send no rank (default: last_known)",
    )
    add("--api-key-file", metavar="FILE", help=f"keys for this front door, one a line (or {_KEY_VARIABLE})")
    add("--tls-cert", metavar="FILE", help="certificate of this front door, PEM")
    add("--tls-key", metavar="FILE", help="its key")
    add(
        "--tries", type=int, default=3, metavar="N", help="most tries of one request before its first byte (default: 3)"
    )
    add("--retry-share", type=float, default=0.2, metavar="X", help="retries as a share of requests (default: 0.2)")
    add("--connect-timeout", type=float, default=2.0, metavar="S", help="to an engine (default: 2)")
    add("--first-byte-timeout", type=float, default=600.0, metavar="S", help="for an answer to begin (default: 600)")
    add("--stream-idle-timeout", type=float, default=600.0, metavar="S", help="between its pieces (default: 600)")
    add(
        "--drain-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="after SIGTERM: /readyz says stopping, new requests are still served (default: 5)",
    )
    add("--stop-timeout", type=float, default=30.0, metavar="S", help="for answers under way at the end (default: 30)")
    add("--idle-timeout", type=float, default=75.0, metavar="S", help="of an unused client connection (default: 75)")
    add("--read-timeout", type=float, default=60.0, metavar="S", help="for a request to arrive whole (default: 60)")
    add("--max-body", type=int, default=64, metavar="MIB", help="largest request body (default: 64)")
    add("--max-bodies", type=int, default=1024, metavar="MIB", help="all bodies held at once (default: 1024)")
    add("--max-head", type=int, default=64, metavar="KIB", help="largest head of a request (default: 64)")
    add("--max-connections", type=int, default=20_000, metavar="N", help="clients at once (default: 20000)")
    add(
        "--budget-ms",
        type=int,
        default=None,
        metavar="MS",
        help="for a decision by Redis (default: DP_BALANCER_BUDGET_MS)",
    )
    add("--show-rank", action="store_true", help="tell clients the rank: X-Balancer-Rank")
    add("--no-access-log", action="store_true", help="no line for each request on stderr")
    add("--mock-ranks", type=int, default=4, metavar="N", help="ranks of the mock engine (default: 4)")


def _options(arguments: argparse.Namespace, engines: tuple[Engine, ...]) -> Options:
    for name in ("workers", "tries", "max_body", "max_bodies", "max_head", "max_connections"):
        if getattr(arguments, name) < 1:
            raise InvalidInput(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("connect_timeout", "first_byte_timeout", "stream_idle_timeout", "idle_timeout", "read_timeout"):
        if not getattr(arguments, name) > 0:
            raise InvalidInput(f"--{name.replace('_', '-')} must be above 0")
    for name in ("drain_seconds", "stop_timeout"):
        if not getattr(arguments, name) >= 0:
            raise InvalidInput(f"--{name.replace('_', '-')} must not be below 0")
    if not 0 <= arguments.port <= 65_535:
        raise InvalidInput(f"--port must be between 0 and 65535, not {arguments.port}")
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise InvalidInput("--tls-cert and --tls-key go together")
    return Options(
        engines=engines,
        host=arguments.host,
        port=arguments.port,
        limits=Limits(
            body=arguments.max_body * MIB,
            bodies=arguments.max_bodies * MIB,
            head=arguments.max_head * 1024,
            connections=arguments.max_connections,
            idle_s=arguments.idle_timeout,
            read_s=arguments.read_timeout,
        ),
        api_keys=_api_keys(arguments.api_key_file),
        engine_key=_key_from(_ENGINE_KEY_VARIABLE),
        cert_file=arguments.tls_cert,
        key_file=arguments.tls_key,
        tokenizer=arguments.tokenizer,
        redis_away=arguments.redis_away,
        connect_s=arguments.connect_timeout,
        first_byte_s=arguments.first_byte_timeout,
        stream_idle_s=arguments.stream_idle_timeout,
        retry_share=arguments.retry_share,
        tries=arguments.tries,
        drain_s=arguments.drain_seconds,
        stop_s=arguments.stop_timeout,
        show_rank=arguments.show_rank,
        access_log=not arguments.no_access_log,
        workers=arguments.workers,
    )


def _api_keys(path: str | None) -> tuple[str, ...]:
    if not path:
        key = _key_from(_KEY_VARIABLE)
        return (key,) if key else ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"--api-key-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"--api-key-file {path} cannot be read: it is not UTF-8") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise InvalidInput(f"--api-key-file {path} holds no key")
    return keys


def _key_from(variable: str) -> str | None:
    """A key from the environment: it stands in a header, so a line's end that came along is taken off."""
    key = os.environ.get(variable, "").strip()
    if not key.isprintable():
        raise InvalidInput(f"{variable} holds a control character")
    return key or None


@contextmanager
def _mock_engine(ranks: int) -> Iterator[Engine]:
    """A mock engine in a process of its own, as engines are."""
    from balancer.serve.mock_process import mock_process

    with mock_process(ranks) as port:
        yield parse_engine(f"http://127.0.0.1:{port},kind=sglang,dp={ranks},name=mock,health=/health")


def _run(arguments: argparse.Namespace) -> int:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        needed = " and ".join(missing)
        raise InvalidInput(f"`balancer serve` needs {needed}: pip install '.[serve]' in dp-balancer's folder")
    from balancer.serve.workers import serve

    engines = checked_engines([parse_engine(word) for word in arguments.engine])
    _log(arguments)
    with ExitStack() as stack:
        given = Settings.from_environment(url=arguments.url, pool=arguments.pool, budget_ms=arguments.budget_ms)
        lines = []
        if given.url is None:
            server = stack.enter_context(EmbeddedRedis())
            given = replace(given, url=server.url)
            lines.append(
                f"Redis      {server.url} (started for this; data end with it: set DP_BALANCER_URL for your own)"
            )
        if not engines:
            engines = (stack.enter_context(_mock_engine(arguments.mock_ranks)),)
            lines.append(f"engine     a mock with {arguments.mock_ranks} ranks at {engines[0].url} (none was given)")
        options = _options(arguments, engines)

        def ready(port: int) -> None:
            scheme = "https" if options.cert_file else "http"
            host = f"[{options.host}]" if ":" in options.host else options.host
            print(*lines, f"pool       {given.pool} at {redacted(given.url or '')}", sep="\n")
            print(f"serving    {scheme}://{host}:{port}, {sum(engine.dp for engine in engines)} ranks", flush=True)

        serve(options, given, ready)
    return Exit.OK


def _log(arguments: argparse.Namespace) -> None:
    """A server says what happens without being asked; -v adds detail."""
    if not arguments.verbose:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        logging.getLogger("balancer").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))


class _Lines(logging.Formatter):
    """A request's line is JSON and nothing else."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == "balancer.access" else super().format(record)


_DETAILS = """\
Listen for HTTP, place each request of OpenAI's API (and SGLang's /generate) on a
rank of the pool, and pass it on; every other request passes through. Replicas are
stateless: start as many as you like, on any machines, on the same pool.

an engine is URL[,kind=sglang|vllm|openai][,dp=N][,hook=NAME[/FIRST]]:
  http://10.0.0.7:30000,kind=sglang,dp=8                 no hook: replicas count for it
  http://10.0.0.7:30000,kind=sglang,dp=8,hook=engine-0   its hook reports as engine-0
  http://10.0.0.8:8000,kind=vllm,dp=8,hook=engine-1/8    its ranks 8 to 15 (hybrid)
  http://10.0.0.9:8003,kind=vllm,hook=engine-1/3         one rank, one address (external)
  further: name=NAME (without a hook), health=/PATH (asked every second)

Without --engine a mock engine answers; without a Redis address one is started.
Paths of its own: /healthz, /readyz, /metrics, /balancer/v1/{dispatch,release,authorize}.
Keys come by file or environment (DP_BALANCER_API_KEY for clients,
DP_BALANCER_ENGINE_KEY towards engines), never by an argument, which others see."""

VERB = Verb(
    name="serve",
    summary="an HTTP dispatcher: OpenAI's API in front, ranks behind",
    details=_DETAILS,
    examples=(
        "balancer serve",
        "balancer serve --pool chat --engine http://10.0.0.7:30000,kind=sglang,dp=8",
        "balancer serve --pool chat --workers 4 --engine http://10.0.0.8:8000,kind=vllm,dp=4,hook=engine-1",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
