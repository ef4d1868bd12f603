"""Each user can do its work and nothing else; a wrong password is a clear error; no log holds a secret."""

from __future__ import annotations

import re
import subprocess

import pytest
import redis
from redis.exceptions import NoPermissionError

from balancer import PoolAdmin
from tests.integration.stack import Stack, docker, plain_client

KEY = "dpb:{demo}:holding"
FORBIDDEN = f"""
ACL LIST|ACL WHOAMI|BGREWRITEAOF|CLIENT KILL TYPE normal|CLIENT LIST|CLUSTER INFO|CONFIG GET *|CONFIG SET maxmemory 1
DEL {KEY}|EXPIRE {KEY} 1|FAILOVER|FLUSHALL|FLUSHDB|FUNCTION LIST|GET foreign|GET {KEY}|HGETALL foreign
HSET foreign a 1|INFO|KEYS *|LPUSH foreign 1|MIGRATE h 1 k 0 1|MODULE LIST|MONITOR|PSYNC ? -1|PUBLISH c 1|RANDOMKEY
RENAME {KEY} {KEY}2|REPLICAOF NO ONE|SAVE|SCAN 0|SCRIPT FLUSH|SCRIPT LOAD x|SET foreign 1|SET {KEY} 1|SHUTDOWN NOSAVE
SUBSCRIBE c|SWAPDB 0 1|SELECT 1|UNLINK foreign|WAIT 0 0|XADD foreign * a 1
"""
SCRIPTS = (
    ("return redis.call('HSET', KEYS[1], 'a', 1)", "foreign"),
    ("return redis.call('SET', KEYS[1], 1)", KEY),
    ("return redis.call('DEL', KEYS[1])", KEY),
    ("return redis.call('KEYS', '*')", KEY),
    ("return redis.call('HGETALL', 'foreign')", KEY),
)


@pytest.mark.parametrize("user", ["dispatcher", "hook", "reader"])
def test_a_user_can_do_nothing_but_its_work(plain: Stack, user: str) -> None:
    with plain.client(user) as client:
        for line in re.split(r"[|\n]", FORBIDDEN.strip()):
            with pytest.raises(NoPermissionError):
                client.execute_command(*line.split(" "))
        for script, key in SCRIPTS:
            with pytest.raises(redis.ResponseError, match=r"permission|can't run this command|can't access|ACL"):
                client.eval(script, 1, key)


def test_a_reader_looks_and_changes_nothing(plain: Stack) -> None:
    admin = PoolAdmin(plain.settings("reader"))
    assert len(admin.snapshot().ranks) == 4
    admin.close()
    with plain.client("reader") as client:
        assert client.hlen(KEY) == 4
        with pytest.raises(NoPermissionError):
            client.hset(KEY, "mock-0/0", 1)
        with pytest.raises(redis.ResponseError):
            client.eval("return redis.call('HSET', KEYS[1], 'mock-0/0', 1)", 1, KEY)


def test_nobody_gets_in_without_a_password(plain: Stack) -> None:
    with plain_client(plain.address(plain.container("redis"))) as client:
        for words in ("PING", "INFO"), ("AUTH", "default", ""), ("AUTH", ""):
            with pytest.raises(redis.AuthenticationError):
                client.execute_command(*words)


def test_a_wrong_password_is_said_clearly_and_not_shown(plain: Stack) -> None:
    wrong = "correct-horse-battery"
    shown = status(plain, DP_BALANCER_PASSWORD=wrong, DP_BALANCER_PASSWORD_FILE="")
    assert shown.returncode not in (0, 1)
    assert "refuses us" in shown.stderr
    assert "check user, password and ACL" in shown.stderr
    in_url = status(plain, DP_BALANCER_URL=f"redis://dispatcher:{wrong}@redis:6379/0", DP_BALANCER_PASSWORD_FILE="")
    assert "redis://dispatcher:***@redis:6379/0" in in_url.stderr
    assert wrong not in shown.stdout + shown.stderr + in_url.stdout + in_url.stderr


def test_a_user_without_the_right_commands_is_told_so(plain: Stack) -> None:
    plain.admin().execute_command("ACL", "SETUSER", "hook", "-hset")
    try:
        environment = {"DP_BALANCER_USERNAME": "hook", "DP_BALANCER_PASSWORD_FILE": "", "DP_BALANCER_PASSWORD": "x"}
        environment["DP_BALANCER_PASSWORD"] = plain.password("hook")
        shown = status(plain, **environment)
        assert "refuses us" in shown.stderr
        assert plain.password("hook") not in shown.stdout + shown.stderr
    finally:
        plain.admin().execute_command("ACL", "LOAD")


def test_no_log_holds_a_secret(plain: Stack) -> None:
    containers = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={plain.project}").split()
    logs = [subprocess.run(["docker", "logs", one], capture_output=True, text=True) for one in containers]
    text = "".join(log.stdout + log.stderr for log in logs)
    inspected = docker("inspect", *containers)
    assert len(text) > 1_000
    for user in ("admin", "dispatcher", "hook", "reader", "replica", "sentinel", "sentinels"):
        assert plain.password(user) not in text
        assert plain.password(user) not in inspected


def status(stack: Stack, **environment: str) -> subprocess.CompletedProcess[str]:
    """`balancer status` in a dispatcher's container, with these variables."""
    settings = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
    command = ["docker", "exec", *settings, stack.dispatchers[0], "balancer", "-vv", "status", "demo"]
    return subprocess.run(command, capture_output=True, text=True)
