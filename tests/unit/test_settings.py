"""What a process is told by its environment, and what a whole pool agrees on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from balancer import Dispatcher, InvalidInput, Settings
from balancer.admin import PoolAdmin
from balancer.settings import default_name

# -- of a process


def test_settings_come_from_the_environment() -> None:
    settings = Settings.from_environment(
        {
            "DP_BALANCER_URL": "redis://10.0.0.5:6380/2",
            "DP_BALANCER_POOL": "chat",
            "DP_BALANCER_BUDGET_MS": "250",
            "DP_BALANCER_PROBE_MS": "900",
            "DP_BALANCER_NAME": "gateway-7",
        }
    )
    assert (settings.url, settings.pool, settings.name) == ("redis://10.0.0.5:6380/2", "chat", "gateway-7")
    assert (settings.budget_ms, settings.probe_ms) == (250, 900)


def test_what_is_given_wins_over_the_environment_and_none_does_not() -> None:
    environment = {"DP_BALANCER_POOL": "chat", "DP_BALANCER_BUDGET_MS": "250"}
    settings = Settings.from_environment(environment, pool="code", budget_ms=None)
    assert (settings.pool, settings.budget_ms) == ("code", 250)


def test_without_anything_the_defaults_hold() -> None:
    settings = Settings.from_environment({})
    assert (settings.url, settings.pool, settings.budget_ms, settings.probe_ms) == (None, "default", 100, 500)
    assert settings.name == default_name()


def test_the_password_may_lie_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    assert Settings.from_environment({"DP_BALANCER_PASSWORD_FILE": str(secret)}).password == "hunter2"


def test_what_sentinels_ask_for_stands_beside_the_url_and_is_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter3\n")
    settings = Settings.from_environment(
        {
            "DP_BALANCER_URL": "redis+sentinel://ann:hunter2@one,two/chat",
            "DP_BALANCER_SENTINEL_USERNAME": "watcher",
            "DP_BALANCER_SENTINEL_PASSWORD_FILE": str(secret),
        }
    )
    address = settings.checked_address()
    assert (address.sentinel_username, address.sentinel_password) == ("watcher", "hunter3")
    assert (address.username, address.password) == ("ann", "hunter2")
    assert "hunter" not in repr(settings) + repr(address)
    with pytest.raises(InvalidInput, match="DP_BALANCER_SENTINEL_PASSWORD_FILE"):
        Settings.from_environment({"DP_BALANCER_SENTINEL_PASSWORD_FILE": str(tmp_path / "missing")})


def test_a_password_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").touch()
        with pytest.raises(InvalidInput, match=r"DP_BALANCER_PASSWORD_FILE .*(missing|empty)"):
            Settings.from_environment({"DP_BALANCER_PASSWORD_FILE": str(path)})


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("DP_BALANCER_BUDGET_MS", "soon", "DP_BALANCER_BUDGET_MS must be a whole number, not 'soon'"),
        ("DP_BALANCER_BUDGET_MS", "0", "budget_ms must be between 1 and 60000"),
        ("DP_BALANCER_PROBE_MS", "60001", "probe_ms must be between"),
        ("DP_BALANCER_POOL", "a b", "pool name 'a b' must be"),
        ("DP_BALANCER_POOL", "{chat}", "pool name"),
        ("DP_BALANCER_POOL", "x" * 65, "pool name"),
        ("DP_BALANCER_NAME", "-n", "dispatcher name"),
        ("DP_BALANCER_URL", "localhost:6379", "redis://"),
        ("DP_BALANCER_URL", "redis://localhost:no", "Redis address"),
    ],
)
def test_a_wrong_variable_is_named_with_what_would_be_right(variable: str, value: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        Dispatcher(Settings.from_environment({"DP_BALANCER_URL": "redis://h:1", variable: value}))


def test_a_dispatcher_without_an_address_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DP_BALANCER_URL", raising=False)
    with pytest.raises(InvalidInput, match="set DP_BALANCER_URL"):
        Dispatcher.connect()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@127.0.0.1:1/0",
        "redis://user:hunter2@127.0.0.1:1/0",
        "redis://user:hunter2@x@127.0.0.1:1/0",
        "rediss://user:hunter2@127.0.0.1:1/0",
        "redis://user:hunter2/x@127.0.0.1:1/0",
        "redis://:hunter2/x@127.0.0.1:1/0",
        "redis://user:x/hunter2@127.0.0.1:1/0",
        "redis://user:x#hunter2@127.0.0.1:1/0",
        "redis://user:x?hunter2@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=hunter2",
        "http://user:hunter2@127.0.0.1:1/0",
    ],
)
def test_a_password_never_shows_in_reprs_messages_or_logs(url: str, caplog: pytest.LogCaptureFixture) -> None:
    shown = []
    with caplog.at_level(logging.DEBUG):
        try:
            settings = Settings(url=url, password="hunter2", budget_ms=20)
            shown += [repr(settings), str(settings)]
            with Dispatcher(settings) as dispatcher:
                dispatcher.dispatch("a", 1)
        except Exception as error:  # whichever it is
            while error:
                shown.append(repr(error))
                error = error.__cause__  # type: ignore[assignment]
    assert "hunter2" not in " ".join([*shown, caplog.text])
    assert shown


# -- of a pool


def test_a_pool_begins_with_the_defaults_and_keeps_what_it_is_told(admin: PoolAdmin) -> None:
    admin.configure(policy="round_robin", engine_lease_ms="9000")
    settings = admin.snapshot().settings
    assert (settings.policy, settings.engine_lease_ms) == ("round_robin", 9_000)
    assert (settings.booking_lease_ms, settings.forget_ms) == (60_000, 3_600_000)
    assert (settings.when_silent, settings.when_full) == ("refuse", "refuse")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, "nothing to configure"),
        ({"policy": "fastest"}, "policy must be one of cost_envelope, .*, round_robin, not 'fastest'"),
        ({"when_full": "explode"}, "when_full must be one of refuse, least_loaded"),
        ({"when_silent": None}, "when_silent must be one of"),
        ({"engine_lease_ms": 49}, "engine_lease_ms must be between 50 and"),
        ({"booking_lease_ms": "1.5"}, "booking_lease_ms must be a whole number"),
        ({"forget_ms": float("nan")}, "forget_ms must be a whole number"),
        ({"forget_ms": -1}, "forget_ms must be between"),
        ({"colour": "red"}, "no setting 'colour': there are policy"),
        ({"schema": "2"}, "no setting 'schema'"),
    ],
)
def test_a_setting_that_cannot_be_is_named_and_nothing_is_written(
    admin: PoolAdmin, changes: dict[str, object], complaint: str
) -> None:
    admin.configure(policy="round_robin")
    with pytest.raises(InvalidInput, match=complaint):
        admin.configure(**changes)
    assert admin.snapshot().settings.policy == "round_robin"
