"""The way to the primary: who is asked, in which order, and what an answer changes."""

from __future__ import annotations

import pytest

from balancer.address import Node, parse_address
from balancer.errors import StoreUnavailable
from balancer.route import MOST_KNOWN, route_to

ONE, TWO, THREE = (Node(name, 6379) for name in ("one", "two", "three"))
S1, S2 = Node("s1", 26379, True), Node("s2", 26379, True)


def test_a_plain_server_stays_whatever_happens() -> None:
    route = route_to(parse_address("redis://one"))
    route.lost(ONE)
    assert route.primary == ONE
    with pytest.raises(StoreUnavailable, match=r"use redis\+cluster"):
        route.moved(TWO)


def test_sentinels_are_asked_in_turn_and_again_when_the_primary_is_lost() -> None:
    route = route_to(parse_address("redis+sentinel://s1,s2/chat"))
    assert route.primary is None
    assert route.question() == (S1, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "chat"))
    # one that does not answer, and one that does not know, make way for the next
    route.lost(S1)
    assert route.question()[0] == S2
    with pytest.raises(StoreUnavailable, match="knows no primary called 'chat'"):
        route.answered(None)
    assert route.question()[0] == S1
    route.answered([b"one", b"6379"])
    assert route.primary == ONE
    # somebody else's late failure on an old primary changes nothing
    route.lost(TWO)
    assert route.primary == ONE
    route.lost(ONE)
    assert route.primary is None


def test_a_sentinel_whose_primary_does_not_serve_makes_way_for_the_next() -> None:
    """One that is cut off from the others goes on naming the old primary."""
    route = route_to(parse_address("redis+sentinel://s1,s2/chat"))
    route.answered([b"one", b"6379"])
    route.lost(ONE)
    assert route.question()[0] == S2
    route.answered([b"two", b"6379"])
    # somebody's second failure on the first one turns nobody away
    route.lost(ONE)
    assert (route.primary, route.question()[0]) == (TWO, S2)


def test_a_cluster_is_asked_through_any_node_and_followed_where_it_sends() -> None:
    route = route_to(parse_address("redis+cluster://one,two"))
    assert route.primary == ONE
    route.moved(THREE)
    assert route.primary == THREE
    # When the node is lost the others are asked in turn, learned ones too
    seen = []
    for _ in range(4):
        assert route.primary
        seen.append(route.primary)
        route.lost(route.primary)
    assert seen == [THREE, ONE, TWO, THREE]


def test_the_nodes_that_a_cluster_has_had_do_not_pile_up() -> None:
    route = route_to(parse_address("redis+cluster://one,two"))
    for number in range(1_000):
        route.moved(Node(f"10.0.0.{number}", 6379))
    seen = set()
    for _ in range(2 * MOST_KNOWN):
        assert route.primary
        seen.add(route.primary)
        route.lost(route.primary)
    assert len(seen) == MOST_KNOWN
    assert {ONE, TWO} <= seen
