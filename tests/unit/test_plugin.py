"""What the engine plugins share: the environment they read, the marks in ids, and hooks that harm nobody."""

from __future__ import annotations

import logging

import pytest

from balancer import InvalidInput, in_flight_id
from balancer.marker import marked, received_id, received_ids
from scheduler_hooks.once import Once
from scheduler_hooks.plugin import PluginSettings, harmless


def test_without_an_address_a_plugin_is_off() -> None:
    assert PluginSettings.from_environment({"DP_BALANCER_POOL": "chat"}) is None


def test_the_environment_says_what_a_plugin_does() -> None:
    found = PluginSettings.from_environment(
        {
            "DP_BALANCER_URL": "redis://10.0.0.5:6379/0",
            "DP_BALANCER_ENGINE": "node-3",
            "DP_BALANCER_ADDRESS": "10.0.0.7:30000",
            "DP_BALANCER_HOOK": "1",
            "DP_BALANCER_DISPATCH": "0",
            "DP_BALANCER_FORM": "leader",
            "DP_BALANCER_EVERY": "4",
            "DP_BALANCER_CAPACITY": "1",
        }
    )
    assert found is not None
    assert (found.engine, found.address, found.form, found.every) == ("node-3", "10.0.0.7:30000", "leader", 4)
    assert (found.hook, found.dispatch, found.capacity) == (True, False, True)


def test_what_is_not_said_is_left_to_the_adapter() -> None:
    found = PluginSettings.from_environment({"DP_BALANCER_URL": "redis://10.0.0.5:6379/0"})
    assert found is not None
    assert (found.engine, found.dispatch, found.form, found.every, found.hook) == (None, None, "auto", 1, True)
    assert not found.capacity  # requests may queue, as the engine lets them


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DP_BALANCER_FORM", "both"),
        ("DP_BALANCER_HOOK", "yes"),
        ("DP_BALANCER_DISPATCH", "2"),
        ("DP_BALANCER_EVERY", "often"),
        ("DP_BALANCER_EVERY", "0"),
        ("DP_BALANCER_CAPACITY", "full"),
        ("DP_BALANCER_ENGINE", "no spaces please"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=variable):
        PluginSettings.from_environment({"DP_BALANCER_URL": "redis://10.0.0.5:6379/0", variable: value})


@pytest.mark.parametrize("shape", ["{}", "cmpl-{}-0-86f184e6", "1_chatcmpl-{}-8df968e2", "generate-tokens-{}-0a"])
def test_a_marked_id_is_known_again_whatever_an_engine_writes_around_it(shape: str) -> None:
    assert received_id(shape.format(marked("req-1"))) == in_flight_id("req-1")


def test_an_id_without_a_mark_is_taken_whole() -> None:
    assert received_id("cmpl-req-1-0-86f184e6") == in_flight_id("cmpl-req-1-0-86f184e6")


@pytest.mark.parametrize("id_", [marked("req-1"), f"cmpl-{marked('req-1')}-0-86f184e6"])
def test_a_marked_id_may_be_booked_by_its_mark_and_whole_and_the_mark_comes_first(id_: str) -> None:
    assert received_ids(id_) == (in_flight_id("req-1"), in_flight_id(id_))


def test_an_id_without_a_mark_is_one_booking() -> None:
    assert received_ids("cmpl-req-1-0-86f184e6") == (in_flight_id("cmpl-req-1-0-86f184e6"),)


def test_a_harmless_function_fails_once_in_the_log_and_never_in_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Once(logging.getLogger("scheduler_hooks"))

    @harmless(trouble, "counting")
    def count(text: str) -> int:
        return int(text)

    assert count("7") == 7
    assert count("seven") is None
    assert count("eight") is None
    assert trouble.counts["counting"] == 2
    assert len([record for record in caplog.records if "counting failed" in record.getMessage()]) == 1
