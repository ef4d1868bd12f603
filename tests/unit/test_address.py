"""URLs of Redis: what each form means, what is refused, and that no password is ever shown."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from balancer import InvalidInput, Settings
from balancer.address import Kind, Node, parse_address, redacted

SECRET = "tr0ub4dor"


def test_a_plain_address_has_one_node_and_a_database() -> None:
    address = parse_address("redis://ann:pa%2Fss%40word@10.0.0.5:6380/3")
    assert (address.kind, address.nodes, address.db, address.is_tls) == (
        Kind.PLAIN,
        (Node("10.0.0.5", 6380),),
        3,
        False,
    )
    assert (address.username, address.password) == ("ann", "pa/ss@word")


@pytest.mark.parametrize(
    ("url", "node"),
    [
        ("redis://host", Node("host", 6379)),
        ("redis://[::1]:7000", Node("::1", 7000)),
        ("redis://", Node("localhost", 6379)),
        ("unix:///run/redis.sock", Node("/run/redis.sock", 0)),
        ("unix:///run/redis.sock?db=2", Node("/run/redis.sock", 0)),
    ],
)
def test_what_a_plain_address_leaves_out_is_as_usual(url: str, node: Node) -> None:
    assert parse_address(url).nodes == (node,)


def test_sentinels_are_nodes_that_hold_no_data() -> None:
    address = parse_address("redis+sentinel://ann:x@one:26379,two,[::1]:1/chat?db=4")
    assert address.nodes == (Node("one", 26379, True), Node("two", 26379, True), Node("::1", 1, True))
    assert (address.kind, address.service, address.db) == (Kind.SENTINEL, "chat", 4)


def test_a_cluster_is_named_by_some_of_its_nodes() -> None:
    address = parse_address("rediss+cluster://one:7000,two")
    assert (address.kind, address.nodes) == (Kind.CLUSTER, (Node("one", 7000), Node("two", 6379)))
    assert address.is_tls


def test_what_the_url_does_not_say_comes_from_beside_it(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.touch()
    address = parse_address("rediss://h", username="ann", password=SECRET, ca_file=str(authority))
    assert (address.username, address.password, address.ca_file) == ("ann", SECRET, str(authority))
    assert parse_address("redis://bob:x@h", username="ann", password=SECRET).password == "x"
    assert parse_address(f"rediss://h?ca_file={authority}").ca_file == str(authority)
    # An authority in the environment does no harm to an address without TLS
    assert parse_address("redis://h", ca_file=str(authority)).ca_file is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://h", "must begin with one of"),
        ("redis://a,b", "redis\\+sentinel:// or redis\\+cluster://"),
        ("redis+sentinel://a,b", "name by which the sentinels know"),
        ("redis+cluster://a/1", "0 in a cluster"),
        ("redis://h/x", "whole number"),
        ("redis://h:0", "between 1 and 65535"),
        ("redis://h:99999", "between 1 and 65535"),
        ("redis://h:six", "not HOST or HOST:PORT"),
        ("redis://h?socket_timeout=60", "nothing is called 'socket_timeout'"),
        ("redis://h?ca_file=x", "nothing is called 'ca_file'"),
        ("rediss://h?ca_file=/nowhere", "not there or no file"),
        ("rediss://h?cert_file=/etc/hostname", "needs its key"),
        ("redis://h?db", "NAME=VALUE"),
    ],
)
def test_an_address_that_cannot_be_is_refused_with_its_reason(url: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        parse_address(url)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://ann:{SECRET}@h:six",
        f"redis://:{SECRET}@h/x",
        f"redis://ann:{SECRET}/rest@h",
        f"redis://ann:x@{SECRET}@h?y=1",
        f"redis+sentinel://ann:{SECRET}@one,two",
        f"rediss+cluster://ann:{SECRET}@one,two/7",
        f"unix://ann:{SECRET}@/run/x?nothing=1",
    ],
)
def test_no_complaint_shows_a_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InvalidInput) as refused:
        Settings(url=url)
    assert SECRET not in str(refused.value) + redacted(url) + caplog.text


def test_settings_with_a_password_show_none() -> None:
    settings = Settings(url=f"redis://ann:{SECRET}@h", password=SECRET)
    assert SECRET not in repr(settings)
    assert SECRET not in repr(settings.checked_address())


def test_a_text_with_several_urls_keeps_all_but_the_passwords() -> None:
    text = f"from redis://a:{SECRET}@h:1/0 to redis+cluster://:{SECRET}@i,j and mail@example.org"
    assert redacted(text) == "from redis://a:***@h:1/0 to redis+cluster://:***@i,j and mail@example.org"
