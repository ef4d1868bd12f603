"""What an operator may say about engines, and what is refused with a hint."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from balancer import InvalidInput
from balancer.cli.serve import _api_keys, _key_from, _Lines
from balancer.serve import EngineKind, parse_engine
from balancer.serve.options import checked_engines
from balancer.serve.retries import RetryBudget


def test_an_engine_without_a_hook_is_named_after_its_address_alike_on_every_replica() -> None:
    engine = parse_engine("http://10.0.0.7:30000,kind=sglang,dp=3")
    assert engine.ranks == ("10.0.0.7-30000/0", "10.0.0.7-30000/1", "10.0.0.7-30000/2")
    assert (engine.hooked, engine.kind, engine.url) == (False, EngineKind.SGLANG, "http://10.0.0.7:30000")


def test_a_hook_names_the_engine_and_perhaps_the_first_of_its_ranks_here() -> None:
    hybrid = parse_engine("http://n1:8000,kind=vllm,dp=2,hook=big/6")
    assert (hybrid.ranks, hybrid.hooked) == (("big/6", "big/7"), True)
    assert parse_engine("http://n1:8003,kind=vllm,hook=big/3").ranks == ("big/3",)


def test_an_address_may_be_ipv6_or_https() -> None:
    engine = parse_engine("https://[::1],name=here")
    assert (engine.host, engine.port, engine.tls, engine.address) == ("::1", 443, True, "[::1]:443")


def test_the_health_of_sglang_is_asked_where_it_costs_no_token() -> None:
    assert parse_engine("http://h:1,kind=sglang").health == "/ready"
    assert parse_engine("http://h:1,health=/x").health == "/x"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("10.0.0.7:30000", "must look like"),
        ("ftp://h:1", "must look like"),
        ("http://h:1/v1", "without a path"),
        ("http://h:99999", "Port"),
        ("http://h:1,kind=trt", "sglang, vllm, openai"),
        ("http://h:1,kind=sglang,dp=0", "between 1 and"),
        ("http://h:1,kind=sglang,dp=x", "whole number"),
        ("http://h:1,dp=2", "only kind=sglang and kind=vllm"),
        ("http://h:1,colour=red", "no option 'colour'"),
        ("http://h:1,hook=a,name=b", "without a hook"),
        ("http://h:1,hook=a b", "must be 1 to 64 characters"),
        ("http://h:1,health=x", "must be a path"),
    ],
)
def test_what_is_wrong_about_an_engine_is_said(word: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=hint):
        parse_engine(word)


def test_no_rank_has_two_addresses() -> None:
    with pytest.raises(InvalidInput, match="two addresses"):
        checked_engines([parse_engine("http://a:1,kind=vllm,dp=2,hook=e"), parse_engine("http://b:1,hook=e/1")])


def test_retries_are_a_share_of_the_requests_beside_a_small_reserve() -> None:
    budget = RetryBudget(share=0.5, reserve=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_a_key_from_the_environment_can_stand_in_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " sk-1\r\n")
    assert _key_from("A_KEY") == "sk-1"
    monkeypatch.setenv("A_KEY", "\n")
    assert _key_from("A_KEY") is None
    monkeypatch.setenv("A_KEY", "sk-1\r\nX-Evil: 1")
    with pytest.raises(InvalidInput, match="A_KEY") as error:
        _key_from("A_KEY")
    assert "sk-1" not in str(error.value)


def test_keys_stand_in_a_file_one_a_line_and_what_is_no_such_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of team A\nsk-1\n\n sk-2 \n")
    assert _api_keys(str(file)) == ("sk-1", "sk-2")
    for content, hint in (
        (b"\n# none\n", "holds no key"),
        (b"sk-1\nsk-\xff2\n", "UTF-8"),
        ("sk-1".encode("utf-16"), "UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(InvalidInput, match=hint) as error:
            _api_keys(str(file))
        assert "sk" not in str(error.value).replace(str(file), "")
    with pytest.raises(InvalidInput, match="cannot be read"):
        _api_keys(str(tmp_path))


def test_a_requests_line_in_the_log_is_json_and_nothing_else() -> None:
    lines = _Lines("%(levelname)s %(message)s")
    record = logging.makeLogRecord({"name": "balancer.access", "msg": "%s", "args": ('{"a":1}',)})
    assert lines.format(record) == '{"a":1}'
    assert lines.format(logging.makeLogRecord({"name": "balancer.serve", "msg": "m"})).endswith(" m")
