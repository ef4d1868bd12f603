"""The command line shows what Redis holds, ends in the documented exit codes and never prints a password."""

from __future__ import annotations

import contextlib
import importlib
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import pytest
import redis

from balancer import Dispatcher, PoolSettings, RankCounts, Reporter, Settings
from balancer.cli import main, status, verb
from balancer.cli.checks_pool import check_bookings, check_engines, check_leases
from balancer.cli.exits import MEANINGS, Exit
from balancer.cli.finding import Result
from balancer.cli.parser import VERBS, parse
from balancer.cli.table import duration, table
from balancer.embedded import EmbeddedRedis, FoundServer, find_server
from balancer.model import EngineState, EngineView, PoolSnapshot, RankView
from balancer.scripts import load_script, script_names
from balancer.settings import _VARIABLES

NOBODY = "redis://127.0.0.1:1/0"
SECRET = "open-sesame"
Eventually = Callable[[Callable[[], object], str], None]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DP_BALANCER_")]:
        if name != "DP_BALANCER_REDIS_SERVER":
            monkeypatch.delenv(name)


@pytest.fixture
def reporter(settings: Settings) -> Iterator[Reporter]:
    """Engine `e0` of two ranks in pool `p`, of which the first holds 3,000 tokens and the second 1,000."""
    made = Reporter(settings, "e0", 2, address="10.0.0.7:30000", capacity_tokens=8_000)
    made.report(7, [RankCounts(3_000, 3), RankCounts(1_000, 1)])
    yield made
    made.close()


@pytest.fixture
def in_pool(settings: Settings, reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The address in the environment, as on an operator's machine; pool `p` has an engine."""
    monkeypatch.setenv("DP_BALANCER_URL", str(settings.url))
    return settings


@pytest.fixture
def own_server() -> Iterator[tuple[EmbeddedRedis, redis.Redis]]:
    """A server whose settings a test may spoil."""
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as client:
        yield server, client


def process(*words: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "balancer.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def checks(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """The doctor's JSON, by check."""
    return {check["check"]: check for check in orjson.loads(capsys.readouterr().out)["checks"]}


# -- status --------------------------------------------------------------------------------------------------


def test_status_shows_engines_ranks_and_balance(in_pool: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with Dispatcher(in_pool) as dispatcher:
        assert dispatcher.dispatch("r", 500).rank == "e0/1"
    assert main(["status", "p"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^pool +p at redis://127\.0\.0\.1:\d+/0$", out, re.M)
    assert re.search(r"^bookings +1 in flight, the first lease ends in .*; 0 expired so far$", out, re.M)
    assert re.search(r"^load +max 3,000, mean 2,250 tokens, max/mean 1\.33 over 2 ranks up$", out, re.M)
    assert re.search(r"^e0 +up +2 +\d+ +7 +\d.* ago +10\.0\.0\.7:30000$", out, re.M)
    assert re.search(r"^RANK +STATE +HOLDING +IN FLIGHT +LOAD +REQUESTS +CAPACITY +REPORT$", out, re.M)
    assert re.search(r"^e0/0 +up +3,000 +0 +3,000 +3 \+ 0 +8,000 +\d.* ago$", out, re.M)
    assert re.search(r"^e0/1 +up +1,000 +500 +1,500 +1 \+ 1 +8,000 +\d.* ago$", out, re.M)


def test_status_shows_pending_tokens_and_kv_usage_where_an_engine_tells_them(
    in_pool: Settings, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter.report(8, [RankCounts(3_000, 3, 2_048, 431), RankCounts(1_000, 1)])
    assert main(["status", "p"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^RANK +STATE .* +REQUESTS +PENDING +KV +CAPACITY +REPORT$", out, re.M)
    assert re.search(r"^e0/0 .* +3 \+ 0 +2,048 +43\.1 % +8,000 +\d.* ago$", out, re.M)
    assert re.search(r"^e0/1 .* +1 \+ 0 +- +- +8,000 +\d.* ago$", out, re.M)


def test_status_in_json_has_the_keys_that_its_help_documents(
    in_pool: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--json", "--pool", "p"]) == 0
    answer = orjson.loads(capsys.readouterr().out)
    documented = status.VERB.details.partition("--json has")[2]
    for key in (*answer, *answer["settings"], *answer["engines"][0], *answer["ranks"][0]):
        assert re.search(rf"\b{key}\b", documented), f"{key} is not documented"
    assert answer["settings"].keys() == PoolSettings.__dataclass_fields__.keys()
    assert answer["max_load_tokens"] == 3_000
    assert [rank["holding_tokens"] for rank in answer["ranks"]] == [3_000, 1_000]
    assert answer["engines"][0]["state"] == "up"


def test_status_of_a_pool_without_engines_says_so(
    in_pool: Settings, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter.leave()
    assert main(["status", "p"]) == 0
    assert "no engine has joined this pool" in capsys.readouterr().out


def test_bookings_of_an_earlier_life_are_shown_as_counting_for_nobody(
    in_pool: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with Dispatcher(in_pool) as dispatcher:
        dispatcher.dispatch("r", 500)
    again = Reporter(in_pool, "e0", 2)
    again.join()
    again.close()
    assert main(["status", "p"]) == 0
    assert "1 in flight (1 to earlier lives of engines: they count for nobody)" in capsys.readouterr().out


def test_the_pool_comes_from_the_word_the_option_or_the_environment(
    in_pool: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "p"]) == main(["status", "--pool", "p"]) == main(["status", "p", "--pool", "p"]) == 0
    assert main(["status"]) == 5
    assert "no pool 'default'" in capsys.readouterr().err
    monkeypatch.setenv("DP_BALANCER_POOL", "p")
    assert main(["status"]) == 0
    assert main(["status", "q", "--pool", "p"]) == 2
    assert "two pools given" in capsys.readouterr().err


def test_watch_shows_one_look_after_another_until_ctrl_c(
    in_pool: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = iter([None])

    def wait(seconds: float) -> None:
        assert seconds == 0.5
        if next(waits, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "sleep", wait)
    assert main(["status", "p", "--watch", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.count("RANK ") == 2
    assert "\x1b" not in out


def test_watch_goes_on_after_an_outage_but_does_not_begin_in_one(
    own_server: tuple[EmbeddedRedis, redis.Redis], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = own_server
    monkeypatch.setattr(verb, "BUDGET_MS", 200)
    assert main(["status", "p", "--watch", "--url", NOBODY]) == 3
    begin = ["configure", "p", "policy=round_robin", "--url", server.url]
    assert main(begin) == 0
    happens = iter([server.stop, lambda: (server.start(), main(begin))])
    monkeypatch.setattr(status, "sleep", lambda _: next(happens, _interrupt)())
    assert main(["status", "p", "--watch", "--url", server.url]) == 0
    shown, complaints = capsys.readouterr()
    assert shown.count("pool      p at") == 2
    assert complaints.count("is not available") == 2


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_watch_on_a_terminal_redraws_in_place(in_pool: Settings) -> None:
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "balancer.cli", "status", "p", "--watch", "0.1"]
    with subprocess.Popen(words, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm"}) as watcher:
        os.close(follower)
        seen = b""
        while seen.count(b"\x1b[J") < 2:
            seen += os.read(leader, 65_536)
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0
    os.close(leader)
    assert seen.count(b"\x1b[2J") == 1
    assert b"Ctrl-C ends" in seen


def test_watched_json_is_one_line_per_look_and_a_closed_pipe_or_ctrl_c_ends_it_cleanly(in_pool: Settings) -> None:
    words = ("status", "p", "--watch", "0.1", "--json")
    with process(*words) as watcher:
        for _ in range(2):
            assert orjson.loads(pipe(watcher.stdout).readline())["pool"] == "p"
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0
        assert pipe(watcher.stderr).read() == ""
    with process(*words) as watcher:
        pipe(watcher.stdout).readline()
        pipe(watcher.stdout).close()
        assert watcher.wait(10) == 0
        assert pipe(watcher.stderr).read() == ""


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_wrong_interval_is_bad_input(in_pool: Settings, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "p", f"--watch={seconds}"]) == 2
    assert "--watch" in capsys.readouterr().err


# -- drain, undrain, configure -------------------------------------------------------------------------------


def test_drain_and_undrain_take_a_rank_and_an_engine_out_and_put_it_back(
    in_pool: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    def states() -> list[str]:
        capsys.readouterr()
        assert main(["status", "p", "--json"]) == 0
        return [rank["state"] for rank in orjson.loads(capsys.readouterr().out)["ranks"]]

    assert main(["drain", "e0/1", "--pool", "p"]) == 0
    assert capsys.readouterr().out == "drained e0/1: pool p now has 1 rank to give\n"
    assert states() == ["up", "draining"]
    assert main(["drain", "e0", "--pool", "p"]) == 0
    assert "no request can be placed in pool p now" in capsys.readouterr().err
    assert states() == ["draining", "draining"]
    assert main(["undrain", "e0", "--pool", "p"]) == 0
    assert capsys.readouterr().out == "undrained e0: pool p now has 2 ranks to give\n"
    assert states() == ["up", "up"]


@pytest.mark.parametrize("target", ["e9", "e0/2", "e0/x", "e0/", "e0/-1", "/1", "e0/1/2"])
def test_what_is_no_rank_of_the_pool_cannot_be_drained(
    in_pool: Settings, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drain", target, "--pool", "p"]) == 2
    assert capsys.readouterr().err.startswith("balancer: ")


def test_configure_shows_and_changes_what_the_pool_agrees_on(
    in_pool: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(in_pool.url)
    assert main(["configure", "p"]) == 0
    assert re.search(r"^policy +envelope +rule by which", capsys.readouterr().out, re.M)
    assert main(["configure", "p", "policy=round_robin", "--url", url, "engine_lease_ms=3000"]) == 0
    assert capsys.readouterr().out == "policy=round_robin (was envelope)\nengine_lease_ms=3000 (was 5000)\n"
    assert main(["configure", "policy=minimum_tokens", "--pool", "p"]) == 0
    assert main(["configure", "--pool", "p"]) == 0
    assert re.search(r"^policy +minimum_tokens.*^engine_lease_ms +3000", capsys.readouterr().out, re.M | re.S)


def test_configure_begins_a_pool_and_says_so(in_pool: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configure", "fresh", "policy=round_robin"]) == 0
    assert capsys.readouterr().out == (
        "pool fresh is new: it begins with the defaults and these changes\npolicy=round_robin\n"
    )


@pytest.mark.parametrize("words", ["policy=best", "colour=red", "engine_lease_ms=1", "policy", "policy=a policy=b"])
def test_a_wrong_setting_is_bad_input_and_changes_nothing(
    in_pool: Settings, words: str, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    before = client.hgetall("dpb:{p}:pool")
    assert main(["configure", "p", *words.split()]) == 2
    assert client.hgetall("dpb:{p}:pool") == before


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_passes_a_good_server_and_changes_nothing(
    in_pool: Settings, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {key: client.dump(key) for key in client.keys("*")}
    assert main(["doctor", "p"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +server +(Redis|Valkey) \d+\.\d+\.\d+ at redis://", out, re.M)
    assert re.search(r"^ok +scripts +\d+ compose, load and run$", out, re.M)
    assert re.search(r"^ok +rights +user default may run all \d+ commands", out, re.M)
    assert re.search(r"^warn +persistence +appendonly no", out, re.M)
    assert re.search(r"^ok +engines +1 engine, 2 of 2 ranks up$", out, re.M)
    assert out.rstrip().endswith("12 ok, 1 warning, 0 failed")
    assert {key: client.dump(key) for key in client.keys("*")} == before


def test_doctor_in_json_has_every_check_that_its_help_lists(
    in_pool: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "p", "--json"]) == 0
    answer = orjson.loads(capsys.readouterr().out)
    assert answer.keys() == {"redis", "pool", "passed", "checks"}
    assert answer["passed"] is True
    listed = re.findall(r"^  (\w+(?: \w+)?)  ", next(v for v in VERBS if v.name == "doctor").details, re.M)
    assert [check["check"] for check in answer["checks"]] == listed
    assert all(check.keys() == {"check", "result", "seen", "advice"} for check in answer["checks"])


def test_doctor_fails_a_pool_that_was_named_and_does_not_exist(
    in_pool: Settings, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "q", "--json"]) == 1
    assert checks(capsys)["pool"]["result"] == "fail"
    assert main(["doctor", "--json"]) == 0
    assert checks(capsys)["pool"]["result"] == "warn"
    assert not client.keys("dpb:{q}:*")


def test_doctor_fails_a_pool_whose_keys_are_foreign_or_newer(
    in_pool: Settings, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    client.hset("dpb:{newer}:pool", "schema", 99)
    assert main(["doctor", "newer", "--json"]) == 1
    assert "schema 99" in checks(capsys)["pool"]["seen"]
    client.hset("dpb:{q}:pool", "schema", 1)
    client.set("dpb:{q}:holding", "not a hash")
    assert main(["doctor", "q", "--json"]) == 1
    assert checks(capsys)["pool"]["result"] == "fail"
    assert main(["status", "q"]) == 5
    client.delete("dpb:{q}:holding")


def test_doctor_fails_a_server_that_evicts(
    own_server: tuple[EmbeddedRedis, redis.Redis], capsys: pytest.CaptureFixture[str]
) -> None:
    server, client = own_server
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert main(["doctor", "--url", server.url]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^fail +memory +maxmemory-policy allkeys-lru\n +> set it to noeviction", out, re.M)


def test_doctor_sees_a_full_memory_persistence_and_a_replica(
    own_server: tuple[EmbeddedRedis, redis.Redis], eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    server, client = own_server
    client.config_set("appendonly", "yes")
    client.config_set("maxmemory", int(1.1 * client.info("memory")["used_memory"]))
    eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"], "the log is in place")
    main(["doctor", "--json", "--url", server.url])
    found = checks(capsys)
    assert found["persistence"]["result"] == "ok"
    assert found["memory"]["result"] == "warn"
    client.config_set("maxmemory", 0)
    client.replicaof("127.0.0.1", 1)
    assert main(["doctor", "--json", "--url", server.url]) == 1
    assert checks(capsys)["role"]["seen"] == "a read-only replica"
    client.replicaof("NO", "ONE")


def test_doctor_takes_forbidden_commands_for_unknown_answers(
    own_server: tuple[EmbeddedRedis, redis.Redis], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, client = own_server
    monkeypatch.setenv("DP_BALANCER_USERNAME", "placer")
    monkeypatch.setenv("DP_BALANCER_PASSWORD", SECRET)
    client.execute_command("ACL SETUSER", "placer", "on", f">{SECRET}", "~dpb:*", "+@all", "-@dangerous", "-@admin")
    assert main(["doctor", "--json", "--url", server.url]) == 0
    found = checks(capsys)
    assert {name for name, check in found.items() if check["result"] == "unknown"} == {
        "server", "role", "memory", "persistence", "cluster",
    }  # fmt: skip
    assert found["scripts"]["result"] == "ok"
    assert found["rights"]["seen"].startswith("user placer may run all")

    client.execute_command("ACL SETUSER", "placer", "-zadd", "-script")
    assert main(["doctor", "--json", "--url", server.url]) == 1
    found = checks(capsys)
    assert (found["rights"]["result"], found["rights"]["advice"]) == ("fail", "the scripts use them: +zadd")
    assert "not needed" in found["scripts"]["seen"]

    client.execute_command("ACL SETUSER", "placer", "-eval", "-evalsha")
    assert main(["doctor", "--json", "--url", server.url]) == 1
    found = checks(capsys)
    assert "+eval +evalsha" in found["scripts"]["advice"]
    assert found["rights"]["result"] == "unknown"


def port_with_bus() -> int:
    """A free port whose cluster bus port, 10,000 above it, is free too; both below those that systems give away."""
    for port in range(20_000 + os.getpid() % 1_000, 22_000):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port
    raise AssertionError("no free pair of ports")


def test_doctor_finds_the_pools_slot_in_a_cluster(
    tmp_path: Path, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "cluster-server"
    program.write_text(f'#!/bin/sh\nexec {find_server().path} "$@" --cluster-enabled yes\n')
    program.chmod(0o755)
    with (
        EmbeddedRedis(FoundServer(program, "configured"), port=port_with_bus()) as server,
        redis.Redis.from_url(server.url, protocol=2) as client,
    ):
        client.execute_command("CLUSTER ADDSLOTS", *range(16_384))
        eventually(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster is up")
        assert main(["doctor", "--json", "--url", server.url]) == 0
        assert re.fullmatch(r"on; all 13 keys in slot \d+, on this node", checks(capsys)["cluster"]["seen"])


def snapshot(
    engine_lease_ms: int = 5_000,
    booking_lease_ms: int = 60_000,
    expired: int = 0,
    states: tuple[EngineState, ...] = (EngineState.UP,),
) -> PoolSnapshot:
    """A pool of engines `e0`, `e1`, ... of one rank each."""
    draining = {EngineState.DRAINING: frozenset([0])}
    return PoolSnapshot(
        pool="p",
        now_ms=1,
        settings=PoolSettings("minimum_tokens", engine_lease_ms, booking_lease_ms, 3_600_000, "refuse", "refuse"),
        engines=tuple(
            EngineView(f"e{i}", state, 1, 1, 1, 1, 90_000, draining.get(state, frozenset()), "")
            for i, state in enumerate(states)
        ),
        ranks=tuple(RankView(f"e{i}/0", state, 0, 0, 0, 0, None, 90_000) for i, state in enumerate(states)),
        bookings=0,
        expired=expired,
        oldest_deadline_ms=None,
    )


UP, DRAINING, SILENT = EngineState.UP, EngineState.DRAINING, EngineState.SILENT


@pytest.mark.parametrize(
    ("finding", "result", "says"),
    [
        (check_leases(snapshot()), Result.OK, "engine 5 s, booking 60 s"),
        (check_leases(snapshot(engine_lease_ms=500)), Result.WARN, "engine 500 ms"),
        (check_leases(snapshot(booking_lease_ms=6_000)), Result.WARN, "booking 6 s"),
        (check_leases(snapshot(booking_lease_ms=7_200_000)), Result.WARN, "booking 2 h"),
        (check_bookings(snapshot(expired=3)), Result.WARN, "3 expired"),
        (check_engines(snapshot(states=())), Result.WARN, "none has joined"),
        (check_engines(snapshot(states=(UP, SILENT))), Result.WARN, "1 of 2 ranks up; silent: e1 (for 90 s)"),
        (check_engines(snapshot(states=(SILENT,) * 5)), Result.FAIL, "0 of 5 ranks up; silent: e0 (for 90 s), e1"),
        (check_engines(snapshot(states=(SILENT,) * 5)), Result.FAIL, "and 2 more"),
        (check_engines(snapshot(states=(DRAINING, DRAINING))), Result.WARN, "all draining"),
        (check_engines(snapshot(states=(DRAINING, UP))), Result.OK, "1 of 2 ranks up, 1 draining"),
    ],
)
def test_doctor_judges_a_pool(finding: Any, result: Result, says: str) -> None:
    assert finding.result is result
    assert says in finding.seen
    assert bool(finding.advice) is (result is not Result.OK)


# -- errors and exit codes -----------------------------------------------------------------------------------

NEED_REDIS = [["status", "p"], ["drain", "e0"], ["undrain", "e0"], ["configure", "p"], ["doctor", "p"]]


@pytest.mark.parametrize("words", NEED_REDIS, ids=lambda words: words[0])
def test_without_an_address_a_verb_says_what_to_do(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "balancer: no Redis address: give --url redis://HOST:PORT/0 or set DP_BALANCER_URL"
        " (`balancer redis` starts a server for a look)\n"
    )


@pytest.mark.parametrize("words", NEED_REDIS, ids=lambda words: words[0])
def test_an_unreachable_redis_ends_in_3(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "BUDGET_MS", 100)
    assert main([*words, "--url", NOBODY]) == 3
    out, err = capsys.readouterr()
    assert "is not available" in (out if words[0] == "doctor" else err)
    assert "Traceback" not in err


@pytest.mark.parametrize("words", NEED_REDIS, ids=lambda words: words[0])
def test_a_wrong_password_ends_in_4_and_is_printed_nowhere(
    words: list[str],
    own_server: tuple[EmbeddedRedis, redis.Redis],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, client = own_server
    client.config_set("requirepass", "right")
    monkeypatch.setenv("DP_BALANCER_DEBUG", "1")
    with_password = server.url.replace("//", f"//:{SECRET}@")
    assert main([*words, "--url", with_password]) == 4
    out, err = capsys.readouterr()
    assert "password" in out + err
    assert SECRET not in out + err
    assert main([*words, "--url", server.url]) == 4


def test_a_right_password_from_a_file_lets_in(
    own_server: tuple[EmbeddedRedis, redis.Redis],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, client = own_server
    client.config_set("requirepass", SECRET)
    (tmp_path / "password").write_text(f"{SECRET}\n")
    monkeypatch.setenv("DP_BALANCER_PASSWORD_FILE", str(tmp_path / "password"))
    assert main(["-vv", "doctor", "--url", server.url]) == 0
    assert SECRET not in "".join(capsys.readouterr())


def test_a_password_in_the_wrong_place_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    misplaced = f"redis://:{SECRET}@10.0.0.5/0"
    for words in (["status", misplaced], ["status", "p", misplaced], [misplaced], ["status", "--url", f"x{misplaced}"]):
        assert main([*words, *([] if "--url" in words else ["--url", NOBODY])]) == 2
        assert SECRET not in "".join(capsys.readouterr())


def test_an_unknown_pool_ends_in_5(in_pool: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status", "nope"], ["drain", "e0", "--pool", "nope"], ["configure", "nope"]):
        assert main(words) == 5
        assert capsys.readouterr().err.startswith("balancer: no pool 'nope' in this Redis: check its name")


@pytest.mark.parametrize(
    "words", ["fly", "status --fly", "status a b", "drain", "status --url", "redis --port x", "redis --port 70000"]
)
def test_bad_usage_is_one_line_and_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert re.fullmatch(r"balancer: [^\n]+\n", capsys.readouterr().err)


def test_no_verb_at_all_shows_the_help_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().err


def test_a_defect_ends_in_70_with_its_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("balancer.cli.script.load_script", lambda name: 1 / 0)
    assert main(["script", "dispatch"]) == 70
    assert "Traceback" not in (err := capsys.readouterr().err)
    assert err.startswith("balancer: defect: ZeroDivisionError")
    monkeypatch.setenv("DP_BALANCER_DEBUG", "1")
    assert main(["script", "dispatch"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_verbose_says_what_is_done_on_stderr(in_pool: Settings) -> None:
    with process("status", "p", "-v") as shown:
        out, err = shown.communicate()
    assert (shown.returncode, "INFO balancer.cli: pool p at redis://" in err) == (0, True)
    assert "INFO" not in out


# -- help, version, script, redis, demo ----------------------------------------------------------------------


def test_the_help_names_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb_ in VERBS:
        assert re.search(rf"^    {verb_.name} +{re.escape(verb_.summary)}$", out, re.M)
        assert verb_.examples[0] in out
    for code in Exit:
        assert re.search(rf"^  {code:<4} {re.escape(MEANINGS[code])}$", out, re.M)


def test_the_help_names_every_variable_that_the_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    named = set(re.findall(r"DP_BALANCER_[A-Z_]+|NO_COLOR", capsys.readouterr().out))
    rooms = [*Path("balancer").rglob("*.py"), *Path("scheduler_hooks").rglob("*.py")]
    read = {name for room in rooms for name in re.findall(r"DP_BALANCER_[A-Z_]+[A-Z]", room.read_text())}
    assert read <= named
    assert {f"DP_BALANCER_{name.upper()}" for name in _VARIABLES} <= named


@pytest.mark.parametrize("name", [verb_.name for verb_ in VERBS if not verb_.parses_itself])
def test_the_help_of_every_verb_has_examples_and_fits_a_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"examples:\n  balancer {name}" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("example", [example for verb_ in VERBS for example in verb_.examples])
def test_every_example_parses(example: str) -> None:
    program, name, *rest = shlex.split(example)
    assert program == "balancer"
    arguments = parse([name, *rest])
    assert arguments.verb == name
    if name == "demo":
        importlib.import_module("scheduler_hooks.demo.run").parser().parse_args(arguments.rest)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == main(["--version"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other
    assert re.fullmatch(r"balancer \d+\.\d+\.\d+.*", one)


def test_script_prints_the_lua_that_redis_gets_with_its_line_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for name in script_names():
        lines = load_script(name).text.splitlines()
        assert main(["script", name]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [re.fullmatch(r" *(\d+)(?:  (.*))?", line).groups("") for line in shown] == [  # type: ignore[union-attr]
            (str(number), line.rstrip()) for number, line in enumerate(lines, start=1)
        ]
        assert main(["script", name, "--raw"]) == 0
        assert capsys.readouterr().out == load_script(name).text
    assert main(["script", "nope"]) == 2


def test_script_without_a_name_lists_all_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["script"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == script_names()
    assert all(re.fullmatch(r"\w+ +[0-9a-f]{12}  \w.{20,}", line) for line in lines)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_redis_runs_a_server_until_it_is_ended_and_leaves_nothing(ending: signal.Signals) -> None:
    with process("redis") as runner:
        address = re.match(r"Redis at (redis://\S+), from ", pipe(runner.stdout).readline())
        assert address
        assert f"redis-cli -u {address[1]}" in pipe(runner.stdout).readline()
        with redis.Redis.from_url(address[1], decode_responses=True, protocol=2) as client:
            directory = Path(client.config_get("dir")["dir"])
            assert directory.is_dir()
        runner.send_signal(ending)
        assert runner.wait(10) == 0
        assert pipe(runner.stderr).read() == ""
        with redis.Redis.from_url(address[1]) as client, pytest.raises(redis.ConnectionError):
            client.ping()
    assert not directory.exists()


def test_redis_on_a_port_in_use_ends_in_3(
    own_server: tuple[EmbeddedRedis, redis.Redis], capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = own_server
    assert main(["redis", "--port", str(server.port)]) == 3
    assert f"port {server.port} on 127.0.0.1 is in use" in capsys.readouterr().err


def test_redis_whose_server_somebody_kills_ends_in_3(capsys: pytest.CaptureFixture[str]) -> None:
    with process("redis") as runner:
        address = re.match(r"Redis at (redis://\S+), from ", pipe(runner.stdout).readline())
        assert address
        with redis.Redis.from_url(address[1]) as client:
            client.shutdown(nosave=True)
        assert runner.wait(10) == 3
        assert "the server has ended" in pipe(runner.stderr).read()


def test_demo_hands_all_that_follows_to_its_own_room(monkeypatch: pytest.MonkeyPatch) -> None:
    room = importlib.import_module("scheduler_hooks.demo.run")
    seen: dict[str, object] = {}
    monkeypatch.setattr(room, "run", lambda arguments: seen.update(vars(arguments)) or 1)
    assert main(["demo", "--ranks", "4", "--quick"]) == 1
    assert (seen["ranks"], seen["quick"]) == (4, True)


@pytest.mark.parametrize("verb_", ["demo --quick --requests 4", "replay --requests 4 --rounds 1 --warm-up 0"])
@pytest.mark.parametrize("module", [False, True], ids=["balancer", "module"])
def test_errors_of_demo_and_replay_end_as_every_verbs_do(
    verb_: str, module: bool, own_server: tuple[EmbeddedRedis, redis.Redis]
) -> None:
    server, client = own_server
    client.config_set("requirepass", SECRET)
    name, *words = verb_.split()
    program = [f"scheduler_hooks.{name}"] if module else ["balancer.cli", name]
    command = [sys.executable, "-m", *program, *words, "--ranks", "2", "--form", "leader", "--url"]
    denied = subprocess.run([*command, server.url], capture_output=True, text=True)
    assert denied.returncode == Exit.DENIED, denied.stderr
    assert denied.stderr.splitlines()[-1].startswith("balancer: ")
    misused = subprocess.run([*command, server.url, "--ranks", "0"], capture_output=True, text=True)
    assert (misused.returncode, misused.stderr) == (Exit.USAGE, "balancer: --ranks must be at least 1\n")


def test_the_command_line_does_not_import_the_demo_or_torch() -> None:
    code = "import sys, balancer.cli; print([m for m in sys.modules if m.startswith(('torch', 'scheduler_hooks'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- tables --------------------------------------------------------------------------------------------------


def test_a_table_stands_in_columns() -> None:
    assert table(["NAME", ">N"], [["a", "1"], ["longer", "1,000"]]) == [
        "NAME        N",
        "a           1",
        "longer  1,000",
    ]


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0 ms"), (999, "999 ms"), (1_000, "1 s"), (3_210, "3.2 s"), (60_000, "60 s"), (120_000, "2 min"),
        (3_600_000, "60 min"), (7_200_000, "2 h"), (7 * 86_400_000, "7 d"),
    ],
)  # fmt: skip
def test_a_duration_is_shown_in_its_largest_fitting_unit(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text
