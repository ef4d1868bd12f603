"""The same small streaming reverse proxy on several HTTP stacks: what `balancer serve` does, without its rules.

Each reads a request's body, parses it, awaits once (in the place of the EVAL), sends the bytes on over a pool of
connections, and streams the answer back piece by piece as it arrives. `python -m tests.bench.serve.proxies STACK PORT
UPSTREAM_PORT` runs one; `stacks.py` measures them. Imports stand in the functions: a stack needs its own packages only.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson

HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host", b"te", b"upgrade"}
HOP_BY_HOP_NAMES = {name.decode() for name in HOP_BY_HOP}
RANK = "x-data-parallel-rank"


async def place(body: bytes) -> str:
    """Parses the request and gives the event loop one turn, as the EVAL would."""
    document = orjson.loads(body)
    assert "messages" in document
    await asyncio.sleep(0)
    return "3"


# --- aiohttp on both sides ---------------------------------------------------------------------------------------


def aiohttp_both(port: int, upstream: str) -> None:
    from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

    async def forward(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP_NAMES]
        headers.append((RANK, await place(body)))
        session = request.app[session_key]
        async with session.request(request.method, upstream + request.path_qs, data=body, headers=headers) as answer:
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP_NAMES]
            length = answer.content_length
            if length is not None and length < 65536:
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
            out = web.StreamResponse(status=answer.status, headers=kept)
            await out.prepare(request)
            async for piece in answer.content.iter_any():
                await out.write(piece)
            await out.write_eof()
            return out

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=0)
        async with ClientSession(connector=connector, auto_decompress=False, timeout=ClientTimeout()) as client:
            app[session_key] = client
            yield

    session_key = web.AppKey("session", ClientSession)
    app = web.Application(client_max_size=2**26)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=lambda *_: None)


def aiohttp_low(port: int, upstream: str) -> None:
    """aiohttp's low-level server: no application, router or signals."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

    async def run() -> None:
        session = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False, timeout=ClientTimeout())

        async def forward(request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP_NAMES]
            headers.append((RANK, await place(body)))
            async with session.request(request.method, upstream + request.path_qs, data=body, headers=headers) as got:
                kept = [(name, value) for name, value in got.headers.items() if name.lower() not in HOP_BY_HOP_NAMES]
                if got.content_length is not None and got.content_length < 65536:
                    return web.Response(status=got.status, headers=kept, body=await got.read())
                out = web.StreamResponse(status=got.status, headers=kept)
                await out.prepare(request)
                async for piece in got.content.iter_any():
                    await out.write(piece)
                await out.write_eof()
                return out

        server = web.Server(forward, access_log=None)
        runner = web.ServerRunner(server)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    asyncio.run(run())


# --- ASGI and RSGI servers with a client -------------------------------------------------------------------------


def asgi_aiohttp(upstream: str) -> Callable[..., Any]:
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    sessions: list[ClientSession] = []

    async def app(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = await _body(receive)
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in HOP_BY_HOP
        ]
        headers.append((RANK, await place(body)))
        if not sessions:
            sessions.append(
                ClientSession(connector=TCPConnector(limit=0), auto_decompress=False, timeout=ClientTimeout())
            )
        url = upstream + scope["path"]
        async with sessions[0].request(scope["method"], url, data=body, headers=headers) as answer:
            kept = [(name.lower(), value) for name, value in answer.raw_headers]
            kept = [pair for pair in kept if pair[0] not in HOP_BY_HOP]
            if answer.content_length is not None and answer.content_length < 65536:
                whole = await answer.read()
                kept.append((b"content-length", b"%d" % len(whole)))
                await send({"type": "http.response.start", "status": answer.status, "headers": kept})
                await send({"type": "http.response.body", "body": whole})
                return
            await send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return app


def asgi_httpx(upstream: str) -> Callable[..., Any]:
    import httpx

    clients: list[httpx.AsyncClient] = []

    async def app(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = await _body(receive)
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP]
        headers.append((RANK.encode(), (await place(body)).encode()))
        if not clients:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            clients.append(httpx.AsyncClient(timeout=None, limits=limits))
        request = clients[0].build_request(scope["method"], upstream + scope["path"], content=body, headers=headers)
        answer = await clients[0].send(request, stream=True)
        kept = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in HOP_BY_HOP]
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    return app


def rsgi_aiohttp(upstream: str) -> Any:
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    class App:
        session: ClientSession | None = None

        async def __rsgi__(self, scope: Any, protocol: Any) -> None:
            body = await protocol()
            headers = [(name, value) for name, value in scope.headers.items() if name not in HOP_BY_HOP_NAMES]
            headers.append((RANK, await place(body)))
            if self.session is None:
                self.session = ClientSession(
                    connector=TCPConnector(limit=0), auto_decompress=False, timeout=ClientTimeout()
                )
            async with self.session.request(scope.method, upstream + scope.path, data=body, headers=headers) as answer:
                kept = [(name.lower(), value) for name, value in answer.headers.items()]
                kept = [pair for pair in kept if pair[0] not in HOP_BY_HOP_NAMES]
                if answer.content_length is not None and answer.content_length < 65536:
                    protocol.response_bytes(answer.status, kept, await answer.read())
                    return
                out = protocol.response_stream(answer.status, kept)
                async for piece in answer.content.iter_any():
                    await out.send_bytes(piece)

    return App()


async def _body(receive: Callable[..., Any]) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return message["body"]  # type: ignore[no-any-return]
    pieces = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        pieces.append(message["body"])
    return b"".join(pieces)


async def _lifespan(receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def uvicorn_with(app: Callable[[str], Any]) -> Callable[[int, str], None]:
    def run(port: int, upstream: str) -> None:
        import uvicorn

        uvicorn.run(
            app(upstream), host="127.0.0.1", port=port, http="httptools", loop="uvloop", log_level="warning",
            access_log=False, lifespan="off", server_header=False, date_header=False,
        )  # fmt: skip

    return run


def granian_with(app: Callable[[str], Any], interface: str) -> Callable[[int, str], None]:
    def run(port: int, upstream: str) -> None:
        from granian import Granian
        from granian.constants import Interfaces, Loops

        Granian(
            "app", address="127.0.0.1", port=port, interface=Interfaces(interface), loop=Loops.uvloop, workers=1,
            log_enabled=False, log_access=False,
        ).serve(target_loader=lambda *_, **__: app(upstream), wrap_loader=False)  # fmt: skip

    return run


# --- httptools' parsers under protocols of our own ---------------------------------------------------------------


def bare(port: int, upstream: str, redis_url: str = "") -> None:
    """The floor: llhttp's parsers (httptools) and two asyncio protocols, nothing between them.

    With a Redis' address the place of the EVAL is taken by one: the dispatch script, its arguments packed by hand, its
    reply looked at by hand.
    """
    import httptools
    import uvloop

    decide = _by_redis(redis_url) if redis_url else place

    upstream_port = int(upstream.rsplit(":", 1)[1])
    idle: list[Upstream] = []

    class Upstream(asyncio.Protocol):
        client: Any = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            self.parser = httptools.HttpResponseParser(self)

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)
            if self.client is not None and self.out:
                self.client.transport.write(b"".join(self.out))
                self.out.clear()

        def send(self, client: Any, head: bytes, body: bytes) -> None:
            self.client, self.out, self.headers = client, [], []
            self.transport.writelines([head, body])  # type: ignore[attr-defined]

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name, value))

        def on_headers_complete(self) -> None:
            self.chunked = True
            self.out.append(b"HTTP/1.1 %d OK\r\n" % self.parser.get_status_code())
            for name, value in self.headers:
                lower = name.lower()
                if lower == b"content-length":
                    self.chunked = False
                elif lower in HOP_BY_HOP:
                    continue
                self.out.append(b"%b: %b\r\n" % (name, value))
            self.out.append(b"transfer-encoding: chunked\r\n\r\n" if self.chunked else b"\r\n")

        def on_body(self, body: bytes) -> None:
            if self.chunked:
                self.out.append(b"%x\r\n%b\r\n" % (len(body), body))
            else:
                self.out.append(body)

        def on_message_complete(self) -> None:
            if self.chunked:
                self.out.append(b"0\r\n\r\n")
            client, self.client = self.client, None
            client.transport.write(b"".join(self.out))
            self.out.clear()
            idle.append(self)

    class Downstream(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            self.parser = httptools.HttpRequestParser(self)

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_message_begin(self) -> None:
            self.url, self.headers, self.body = b"", [], []

        def on_url(self, url: bytes) -> None:
            self.url += url

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name.lower(), value))

        def on_body(self, body: bytes) -> None:
            self.body.append(body)

        def on_message_complete(self) -> None:
            self.task = asyncio.get_running_loop().create_task(self.forward(self.parser.get_method()))

        async def forward(self, method: bytes) -> None:
            body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
            rank = await decide(body)
            lines = [b"%b %b HTTP/1.1\r\nhost: engine\r\n" % (method, self.url)]
            lines += [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] not in HOP_BY_HOP]
            lines.append(b"%b: %b\r\ncontent-length: %d\r\n\r\n" % (RANK.encode(), rank.encode(), len(body)))
            if idle:
                connection = idle.pop()
            else:
                _, connection = await loop.create_connection(Upstream, "127.0.0.1", upstream_port)
            connection.send(self, b"".join(lines), body)

    loop = uvloop.new_event_loop()
    loop.run_until_complete(loop.create_server(Downstream, "127.0.0.1", port, backlog=4096))
    loop.run_forever()


def _by_redis(url: str) -> Callable[[bytes], Awaitable[str]]:
    """A decision by one EVALSHA over one connection: requests booked in a pool that one engine has joined."""
    from collections import deque

    from balancer import protocol
    from balancer.model import Incarnation, RankCounts, Report, Request
    from balancer.scripts import load_script
    from balancer.settings import Settings
    from balancer.store import Store

    settings = Settings.from_environment(url=url, pool="floor")
    store = Store(settings)
    store.run(protocol.configure("floor", {"engine_lease_ms": 3_600_000}))
    engine = store.run(protocol.join("floor", Incarnation("floor", 1, "floor")))
    store.run(protocol.report("floor", engine, Report(1, (RankCounts(0, 0),))))
    waiting: deque[asyncio.Future[bytes]] = deque()
    connected: list[asyncio.Transport] = []
    number = 0

    class Replies(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            assert b"placed" in data, data
            waiting.popleft().set_result(data)

    async def decide(body: bytes) -> str:
        nonlocal number
        assert "messages" in orjson.loads(body)
        loop = asyncio.get_running_loop()
        if not connected:
            host, _, redis_port = url.partition("//")[2].partition("/")[0].partition(":")
            connected.append((await loop.create_connection(Replies, host, int(redis_port)))[0])
        number += 1
        asked = protocol.dispatch("floor", "floor", [Request(f"{os.getpid()}-{number}", 300)])
        words = ["EVALSHA", load_script("dispatch").sha, len(asked.keys), *asked.keys, *asked.arguments]
        texts = [str(word).encode() for word in words]
        answer = loop.create_future()
        waiting.append(answer)
        connected[0].write(b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%b\r\n" % (len(text), text) for text in texts))
        return "3" if await answer else ""

    return decide


def on_uvloop(run: Callable[[int, str], None]) -> Callable[[int, str], None]:
    def started(port: int, upstream: str) -> None:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        run(port, upstream)

    return started


STACKS: dict[str, Callable[[int, str], None]] = {
    "aiohttp + aiohttp, asyncio": aiohttp_both,
    "aiohttp + aiohttp, uvloop": on_uvloop(aiohttp_both),
    "aiohttp low-level + aiohttp, uvloop": on_uvloop(aiohttp_low),
    "uvicorn + aiohttp": uvicorn_with(asgi_aiohttp),
    "uvicorn + httpx": uvicorn_with(asgi_httpx),
    "granian asgi + aiohttp": granian_with(asgi_aiohttp, "asgi"),
    "granian rsgi + aiohttp": granian_with(rsgi_aiohttp, "rsgi"),
    "httptools, bare": bare,
}
FLOORS: dict[str, Callable[[int, str, str], None]] = {"httptools, one EVALSHA": bare}
"""With the address of a Redis."""

if __name__ == "__main__":
    (STACKS | FLOORS)[sys.argv[1]](int(sys.argv[2]), f"http://127.0.0.1:{sys.argv[3]}", *sys.argv[4:])
