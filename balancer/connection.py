"""The driver at arm's length: clients for the nodes of an address, and its exceptions as ours.

With `store` the only room that imports redis. A client here retries nothing, discovers nothing and connects when it is
first used: where to go is `route`'s business, whether to try again is `store`'s.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Generic, TypeVar, cast

import redis
import redis.asyncio
from redis import exceptions as driver
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from balancer.address import Address, Node, redacted
from balancer.blocking import BESIDE_S, BlockingClient, Line
from balancer.errors import CorruptPool, InvalidInput, StoreDenied, StoreError, StoreUnavailable
from balancer.names import Names
from balancer.pipeline import Opened, PipelinedClient
from balancer.settings import Settings

# What the driver would say and ask on each new connection costs a round trip each, which a short budget does not have,
# and rights that our users need for nothing else.
_QUIET: dict[str, Any] = {"lib_name": None, "lib_version": None}
if find_spec("redis.driver_info"):
    _QUIET = {"driver_info": None}
if find_spec("redis.maint_notifications"):
    from redis.maint_notifications import MaintNotificationsConfig

    _QUIET["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)

_DENIED = (driver.AuthenticationError, driver.AuthorizationError, driver.NoPermissionError)
_DENIED_WORDS = ("unauthenticated", "The user executing the script", "ACL failure in script")
"""Without a password a server takes no command as long as ours; the others come from inside a script."""
_NOT_NOW = (
    driver.ConnectionError,
    driver.TimeoutError,
    driver.ReadOnlyError,
    driver.OutOfMemoryError,
    driver.ClusterDownError,
    driver.TryAgainError,
    driver.AskError,
    OSError,
)
_NOT_NOW_WORDS = ("READONLY", "OOM ", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOREPLICAS", "BUSY ")
"""What a script meets inside, and what the driver knows no class for."""
_DEMOTED, _DEMOTED_WORDS = (driver.ReadOnlyError, driver.MasterDownError), ("READONLY", "MASTERDOWN")
_NOT_OURS = ("WRONGTYPE", "CORRUPT", "is not an integer", "not a valid float", "attempt to", "bad argument")
_TLS_BREAKS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, TimeoutError)


_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: a connection that is given up takes what it has not delivered with it. Otherwise the system goes on
sending it for minutes, and a dispatch that nobody waits for would book when the network is back."""


_names = Names()


class _Timed:
    """A connection whose opening has until `until_s`: no step of it waits longer than what is left.

    The driver knows a limit for each step only: for each address, and for each reply to what it has to say.
    """

    until_s: float

    def read_response(self, *arguments: Any, **named: Any) -> Any:
        self._sock.settimeout(self._left_s())  # type: ignore[attr-defined]
        return super().read_response(*arguments, **named)  # type: ignore[misc]

    def _left_s(self) -> float:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise driver.TimeoutError("no time is left")
        return left_s


class _UnixConnection(_Timed, redis.UnixDomainSocketConnection):
    pass


class _Connection(_Timed, redis.Connection):
    """One whose host's name is looked up within what is left; the driver's own look-up has no limit.

    An address has about the time of a try: where that is too little for a connection it is for a command too.
    """

    def _connect(self) -> socket.socket:
        name, limit_s, problem = self.host, self.socket_connect_timeout or math.inf, OSError("no address")
        try:
            for address in _names.addresses(name, self._left_s()):
                self.host, self.socket_connect_timeout = address, min(limit_s, self._left_s())
                try:
                    found = cast(socket.socket, super()._connect())  # type: ignore[no-untyped-call]
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                    return found
                except OSError as error:
                    problem = error
        finally:
            self.host = name
        raise problem


class _TlsConnection(redis.SSLConnection, _Connection):
    """One TLS context for all connections: the driver makes one for each, which takes 40 ms, longer than a try may."""

    def __init__(self, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._context = context

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        sock.settimeout(self._left_s())
        return self._context.wrap_socket(sock, server_hostname=self.host)


class _AsyncConnection(redis.asyncio.Connection):
    """The same for asyncio, where a look-up without a limit would hold one of the loop's few threads.

    One opens for all, and each of them waits no longer than it can: the look-up need not end within their time.
    """

    _tls: ssl.SSLContext | None = None
    _address = ""

    async def _connect(self) -> None:
        problem = OSError("no address")
        for address in await _names.addresses_async(self.host, max(BESIDE_S, self.socket_connect_timeout or 0)):
            self._address = address
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
                assert self._writer
                found = self._writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                return
            except OSError as error:
                problem = error
        raise problem

    async def disconnect(self, *arguments: Any, **named: Any) -> None:
        if self._writer is not None:  # no farewell, which over TLS would wait half a minute for its answer
            self._writer.transport.abort()
        await super().disconnect(*arguments, **named)

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments: dict[str, Any] = {"host": self._address, "port": self.port}
        return {**arguments, "ssl": self._tls, "server_hostname": self.host} if self._tls else arguments


class _AsyncTlsConnection(_AsyncConnection):
    """And one TLS context for all, for making one would hold up everybody."""

    def __init__(self, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._tls = context


C = TypeVar("C")


class Clients(Generic[C]):
    """One client per node, made when it is first asked for; `kinds` are the driver's connections by TCP, TLS and Unix
    socket, `made_of` makes a client of one of them and its options."""

    def __init__(self, settings: Settings, retry: Any, kinds: Sequence[Any], made_of: Callable[..., C]) -> None:
        self._address = settings.checked_address()
        self._options = _options(settings, retry)
        plain, tls, self._unix = kinds
        self._tcp = tls if self._address.is_tls else plain
        self._made_of = made_of
        if self._address.is_tls:
            # A handshake is two round trips more, and work for both sides.
            self._options["socket_connect_timeout"] *= 2
            self._options["context"] = _tls_context(self._address)
        self._made: dict[Node, C] = {}

    def to(self, node: Node) -> C:
        """The client for `node`."""
        found = self._made.get(node)
        return found if found is not None else self._made.setdefault(node, self._make(node))

    def made(self) -> tuple[C, ...]:
        """All clients so far."""
        return tuple(self._made.values())

    def _make(self, node: Node) -> C:
        address, options = self._address, dict(self._options)
        if node.is_sentinel:
            options.update(username=address.sentinel_username, password=address.sentinel_password)
        else:
            options.update(db=address.db, username=address.username, password=address.password)
        if not node.port:
            return self._made_of(self._unix, path=node.host, **options)
        return self._made_of(self._tcp, host=node.host, port=node.port, socket_keepalive=True, **options)


def sync_clients(settings: Settings) -> Clients[BlockingClient]:
    """Clients that block; shared between threads, and across fork."""

    def made_of(kind: Any, **options: Any) -> BlockingClient:
        return BlockingClient(lambda until_s: _line(kind(**options), until_s), _is_demotion)

    kinds = (_Connection, _TlsConnection, _UnixConnection)
    return Clients(settings, Retry(NoBackoff(), 0), kinds, made_of)


def async_clients(settings: Settings) -> Clients[PipelinedClient]:
    """Clients of one event loop."""

    def made_of(kind: Any, **options: Any) -> PipelinedClient:
        return PipelinedClient(lambda: _opened(kind(**options)), options["socket_timeout"])

    kinds = (_AsyncConnection, _AsyncTlsConnection, redis.asyncio.UnixDomainSocketConnection)
    return Clients(settings, AsyncRetry(NoBackoff(), 0), kinds, made_of)


def _line(link: Any, until_s: float) -> Line:
    """Open a connection of the driver's and take its socket; the driver keeps no hand in it but for its end."""
    link.until_s = until_s
    link.connect()
    return Line(link._sock, link._parser.parse_error, link.disconnect)


async def _opened(link: Any) -> Opened:
    """As `_line`, with an `await`."""
    await link.connect()
    return Opened(link._writer.transport, link._parser.parse_error, _is_demotion, link.disconnect)


def _is_demotion(reply: Exception) -> bool:
    """Whether a node says that it is no primary. Its name may lead to the new one by now, but only new connections."""
    return isinstance(reply, _DEMOTED) or any(word in str(reply) for word in _DEMOTED_WORDS)


def no_answer(settings: Settings) -> str:
    """What a caller is told when the budget has gone by."""
    return f"no answer from Redis at {redacted(settings.url or '')} within {settings.budget_ms} ms"


def translated(error: Exception, settings: Settings, node: Node) -> StoreError | CorruptPool:
    """The driver's, the system's or the TLS library's `error` as one of ours; `node` is who was asked."""
    text, where = str(error), f"Redis at {redacted(settings.url or '')}"
    if node.is_sentinel:
        where += f" (sentinel {node})"
    elif str(node) not in where:
        where += f" (node {node})"
    if isinstance(error, _DENIED) or any(word in text for word in _DENIED_WORDS):
        return StoreDenied(f"{where} refuses us: {text} (check user, password and ACL)")
    if _is_tls_refusal(error):
        return StoreDenied(f"{where}: certificate not accepted: {text} (check CA, client certificate and rediss://)")
    if isinstance(error, driver.TimeoutError | TimeoutError):
        return StoreUnavailable(no_answer(settings))
    if isinstance(error, _NOT_NOW) or any(word in text for word in _NOT_NOW_WORDS):
        return StoreUnavailable(f"{where} is not available: {text}")
    if any(word in text for word in _NOT_OURS):
        return CorruptPool(
            f"a key of this pool in {where} holds something that dp-balancer did not write ({text}): "
            "look with redis-cli, delete the pool's keys (engines join again by their next report) or rename the pool"
        )
    return StoreError(f"{where}: {text}")


def _options(settings: Settings, retry: Any) -> dict[str, Any]:
    timeout_s = settings.budget_ms / 1000 / settings.tries  # what a silent server may cost
    return {
        **_QUIET,
        "protocol": 2,
        "retry": retry,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
    }


def _tls_context(address: Address) -> ssl.SSLContext:
    """The server's certificate and name are checked; ours is shown where there is one."""
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
        if address.cert_file:
            context.load_cert_chain(address.cert_file, address.key_file)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(file for file in (address.ca_file, address.cert_file, address.key_file) if file)
        raise InvalidInput(f"a certificate or key cannot be used ({files}): {error}") from None
    return context


def _is_tls_refusal(error: Exception) -> bool:
    """Whether TLS itself said no (a certificate, an authority, no TLS at all): not that it broke off or was slow."""
    said = error if isinstance(error, ssl.SSLError) else error.__cause__ or error.__context__
    if isinstance(said, _TLS_BREAKS):
        return False
    return isinstance(said, ssl.SSLError) or "[SSL: " in str(error)
