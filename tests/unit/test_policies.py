"""Each policy chooses what its words say: small cases by hand, long ones beside a twin, and what holds for all."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis

from balancer import Dispatcher, InvalidInput, NoRank, Placement, RankCounts, Reporter, Request, Settings
from balancer.admin import PoolAdmin
from balancer.cli import main
from balancer.keys import KEY_NAMES
from balancer.model import in_flight_id
from balancer.policies import parameters, policies
from balancer.pool_settings import checked_settings
from balancer.scripts import lua_directory
from balancer.simulator.policies import TURNS, TWINS, Loads
from tests.clock import Clock

Join = Callable[..., Reporter]
EVERY = pytest.mark.parametrize("policy", policies())
pytestmark = pytest.mark.usefixtures("clock")  # that stands still: no lease ends, however slow the machine


def held(*counts: tuple[int, int]) -> list[RankCounts]:
    """Tokens and requests of each rank."""
    return [RankCounts(tokens, requests) for tokens, requests in counts]


def ranks_of(answers: Sequence[Placement | NoRank]) -> list[str]:
    return [answer.rank for answer in answers if isinstance(answer, Placement)]


# -- what each of them is for


def test_minimum_requests_joins_the_shortest_queue_however_full(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    admin.configure(policy="minimum_requests")
    join("e", 3).report(1, held((10, 5), (9_000, 2), (20, 4)))
    assert ranks_of([dispatcher.dispatch(f"r{i}", 1) for i in range(2)]) == ["e/1", "e/1"], (
        "what is in flight queues too"
    )
    assert {dispatcher.dispatch("c", 1).rank, dispatcher.dispatch("d", 1).rank} == {"e/1", "e/2"}


def test_random_and_power_of_two_are_chance_and_the_better_of_two_chances(
    join: Join, settings: Settings, admin: PoolAdmin
) -> None:
    join("e", 4).report(1, held((0, 0), (10**9, 1), (2 * 10**9, 1), (3 * 10**9, 1)))
    seen = {}
    with Dispatcher(settings) as dispatcher:
        for policy in ("random", "power_of_two"):
            admin.configure(policy=policy)
            seen[policy] = Counter(dispatcher.dispatch(f"{policy}-{i}", 1).rank for i in range(1_200))
    assert all(240 < seen["random"][f"e/{index}"] < 360 for index in range(4)), "a quarter each"
    shares = [seen["power_of_two"][f"e/{index}"] / 1_200 for index in range(4)]
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0], abs=0.05)


def test_the_envelope_evens_out_requests_below_a_ceiling_in_tokens(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    # The ceiling is the mean and a quarter of the largest prompt: 8,750 + 50 for the first request, of 200 tokens.
    admin.configure(policy="envelope")
    join("e", 4).report(1, held((12_000, 1), (8_500, 3), (8_000, 3), (6_500, 30)))
    assert dispatcher.dispatch("a", 200).rank == "e/1", "few requests, and the fuller of two; e/0 is above the ceiling"
    assert dispatcher.dispatch("b", 200).rank == "e/2", "e/1 has one more now"


def test_what_fits_nowhere_goes_where_the_least_tokens_are(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    admin.configure(policy="envelope")
    join("e", 4).report(1, held((12_000, 1), (9_000, 3), (9_500, 3), (4_500, 30)))
    assert dispatcher.dispatch("giant", 20_000).rank == "e/3", "however many requests it has"


def test_the_envelope_reaches_as_far_as_k_says(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    engine = join("e", 3)
    for k, rank in ((0.25, "e/1"), (1.0, "e/0")):
        admin.configure(**{"policy": "envelope", "envelope.k": k})
        engine.report(1 + int(k), held((11_500, 1), (10_000, 2), (13_000, 9)))
        assert dispatcher.dispatch(f"k={k}", 1_000).rank == rank  # mean 11,500; 12,500 fits below 12,500 only


def test_a_giant_is_remembered_by_all_dispatchers_and_slowly_forgotten(
    join: Join, settings: Settings, admin: PoolAdmin, client: redis.Redis
) -> None:
    admin.configure(policy="envelope")
    join("e", 2)
    with Dispatcher(settings) as one, Dispatcher(settings) as other:
        one.dispatch("giant", 100_000)
        other.dispatch("b", 10)
    assert float(client.hget("dpb:{p}:pool", "largest") or 0) == pytest.approx(99_900)


def test_a_pool_whose_keys_have_ended_is_indexed_anew(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis
) -> None:
    admin.configure(policy="envelope")
    join("gone", 4).report(1, held(*[(500, 5)] * 4))
    for number in range(3):
        dispatcher.dispatch(f"a{number}", 10)
    client.delete(*(f"dpb:{{p}}:{name}" for name in KEY_NAMES if name != "pool"))
    for number in range(3):
        with pytest.raises(NoRank, match="nobody_joined"):
            dispatcher.dispatch(f"b{number}", 10)
    assert not dispatcher.is_falling_back
    join("e", 2).report(1, held((100, 1), (200, 1)))
    dispatcher.dispatch("c", 10)
    dispatcher.dispatch("d", 10)
    told = str(client.hget("dpb:{p}:pool", "queue_sums")).split()
    assert told[:3] == ["320", "4", "2"], "tokens, requests and ranks of those that are there"


def test_the_cost_envelope_counts_requests_as_tokens(join: Join, dispatcher: Dispatcher, admin: PoolAdmin) -> None:
    # At 1,500 tokens a request they cost 10,500, 11,000 and 4,600; the ceiling is 8,700 + 25.
    admin.configure(policy="cost_envelope")
    engine = join("e", 3)
    engine.report(1, held((9_000, 1), (2_000, 6), (1_600, 2)))
    assert dispatcher.dispatch("a", 100).rank == "e/2"
    # At 10 a request: 9,010, 8,060 and 1,620. Of those below, e/1 has 4 requests more than the fewest.
    for slack, rank in ((2, "e/2"), (4, "e/1")):
        admin.configure(**{"cost_envelope.request_tokens": 10, "cost_envelope.slack": slack})
        engine.report(1 + slack, held((9_000, 1), (5_000, 6), (1_600, 2)), [in_flight_id("a"), in_flight_id("2")])
        assert dispatcher.dispatch(str(slack), 100).rank == rank


def test_the_pending_envelope_lets_no_prompt_wait_while_a_rank_has_none(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin
) -> None:
    engine = join("e", 3)
    placed = {}
    for step, policy in enumerate(("minimum_tokens", "pending_envelope")):
        admin.configure(policy=policy)
        engine.report(1 + step, held((0, 0), (9_000, 3), (9_500, 3)), [in_flight_id(f"0{i}") for i in range(3)])
        placed[policy] = ranks_of([dispatcher.dispatch(f"{step}{i}", 500) for i in range(3)])
    assert placed["minimum_tokens"] == ["e/0", "e/0", "e/0"]
    assert sorted(placed["pending_envelope"]) == ["e/0", "e/1", "e/2"]


@pytest.mark.parametrize("policy", ["minimum_tokens", "envelope", "pending_envelope"])
def test_an_ordinary_dispatch_looks_at_a_few_of_many_ranks(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, client: redis.Redis, policy: str
) -> None:
    admin.configure(policy=policy)
    join("e", 40).report(1, held(*((1_000 + 7 * index, 3 + index % 5) for index in range(40))))
    dispatcher.dispatch("first", 10)
    client.config_resetstat()
    for number in range(30):  # some fit everywhere, some nowhere
        dispatcher.dispatch(f"r{number}", 50 + 300 * (number % 7))
    assert "cmdstat_hgetall" not in client.info("commandstats")


# -- beside a twin


@pytest.mark.parametrize("policy", TWINS)
@pytest.mark.parametrize("list_size", [1, 9])
def test_a_long_run_is_decided_as_the_twin_decides_it(
    join: Join, run: Callable[..., Any], admin: PoolAdmin, policy: str, list_size: int
) -> None:
    from balancer import protocol

    source = random.Random(f"{policy}/{list_size}")
    admin.configure(policy=policy)
    engine, names = join("e", 12), sorted(f"e/{index}" for index in range(12))
    choose = TWINS[policy](12).choose
    sent: list[tuple[int, str, int]] = []
    for step in range(1, 40):
        counts = [RankCounts(source.randint(0, 60_000), source.randint(0, 40)) for _ in range(12)]
        received, sent = sent[: source.randrange(40)], []
        engine.report(step, counts, [id_ for id_, _, _ in received])
        admin.configure(policy=policy)
        snapshot = {rank.rank: rank for rank in admin.snapshot().ranks}
        seen = [snapshot[name] for name in names]
        loads = Loads(
            [rank.load_tokens for rank in seen],
            [rank.requests + rank.in_flight_requests for rank in seen],
            [0] * 12,
            [rank.in_flight_tokens for rank in seen],
        )
        for at in range(0, 9, list_size):
            requests = [Request(f"{step}-{at + i}", source.choice((50, 900, 4_000, 30_000))) for i in range(list_size)]
            outcomes = run(protocol.dispatch("p", "d", requests)).outcomes
            for request, outcome in sorted(
                zip(requests, outcomes, strict=True), key=lambda answered: -answered[0].tokens
            ):
                rank = choose(loads, request.tokens, request.in_flight_id % TURNS)
                assert names.index(outcome.rank) == rank, f"step {step}, {request}"
                for column, added in ((loads.tokens, request.tokens), (loads.in_flight, request.tokens)):
                    column[rank] += added
                loads.requests[rank] += 1
                sent.append((request.in_flight_id, outcome.rank, request.tokens))


# -- what holds for all


@EVERY
def test_an_idle_pool_is_filled_evenly_not_from_its_first_rank(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    join("e", 8)
    first = Counter(ranks_of([dispatcher.dispatch(f"r{i}", 1_000) for i in range(16)]))
    assert len(first) == 8 or policy in ("random", "power_of_two")
    assert max(first.values()) <= 6


@EVERY
def test_of_an_idle_pool_each_rank_may_be_the_first(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    join("e", 4)
    first = set()
    for number in range(40):
        first.add(dispatcher.dispatch(f"r{number}", 1_000).rank)
        dispatcher.release(f"r{number}")
    assert len(first) == 4


@EVERY
def test_a_full_rank_gets_nothing_and_a_list_is_placed_while_there_is_room(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    join("e", 3, capacity_tokens=1_000).report(1, held((990, 0), (0, 9), (400, 1)))
    answers = dispatcher.dispatch_many([Request(f"r{i}", 100) for i in range(40)])
    assert Counter(ranks_of(answers)) == {"e/1": 10, "e/2": 6}
    assert sum(isinstance(answer, NoRank) for answer in answers) == 24


@EVERY
def test_a_draining_rank_gets_nothing(join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str) -> None:
    admin.configure(policy=policy)
    join("e", 4)
    admin.drain("e", 2)
    assert "e/2" not in {dispatcher.dispatch(f"r{i}", 100).rank for i in range(24)}


@EVERY
def test_the_largest_of_a_list_is_placed_first_and_the_answers_keep_the_order_given(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    join("e", 2, capacity_tokens=1_000)
    sizes = [300, 200, 1_000, 500]  # they fit in no other order: 1,000 alone, the rest together
    answers = dispatcher.dispatch_many([Request(f"r{i}", tokens) for i, tokens in enumerate(sizes)])
    assert [answer.request.tokens for answer in answers if isinstance(answer, Placement)] == sizes
    small, smaller, giant, large = ranks_of(answers)
    assert small == smaller == large != giant


@EVERY
def test_the_same_requests_on_the_same_pool_fall_alike(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy)
    requests = [Request(f"r{i}", 10 + i) for i in range(30)]
    runs = []
    for _ in range(2):
        admin.remove()
        admin.configure(policy=policy)
        join("e", 5).report(1, held(*[(100 * index, index) for index in range(5)]))
        runs.append(ranks_of(dispatcher.dispatch_many(requests)))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 30


# -- weights and slow start


@EVERY
def test_a_rank_of_double_weight_takes_twice_as_much(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, policy: str
) -> None:
    admin.configure(policy=policy, weights="big=2,e/2=0.5")
    join("big", 1), join("e", 3)
    seen = Counter(ranks_of([dispatcher.dispatch(f"r{i}", 1_000) for i in range(450)]))
    share = {rank: count / 450 for rank, count in seen.items()}
    # Two ranks drawn with equal chances leave a small weight more than its share.
    assert share["big/0"] == pytest.approx(2 / 4.5, abs=0.01 if policy not in ("random", "power_of_two") else 0.06)
    assert share["e/2"] < 0.7 * share["e/0"]
    assert share["e/0"] == pytest.approx(share["e/1"], abs=0.06)


@pytest.mark.parametrize("policy", ["minimum_tokens", "minimum_requests", "envelope", "cost_envelope"])
def test_an_engine_that_has_just_joined_is_not_stormed(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock, policy: str
) -> None:
    admin.configure(policy=policy, slow_start_ms=10_000)
    old = join("old", 2)
    clock.move(10_000)
    old.report(1, held((50_000, 50), (50_000, 50)))
    join("new", 1)

    def given(prefix: str) -> Counter[str]:
        """Where 40 requests of 1,000 tokens go; the engines report nothing of them."""
        return Counter(dispatcher.dispatch(f"{prefix}{i}", 1_000).rank for i in range(40))

    begun = given("a")
    assert 0 < begun["new/0"] <= 10, "a tenth of what the others hold, not all until it has caught up"
    clock.move(4_999)
    old.report(2, held((50_000, 50), (50_000, 50)))
    assert 10 < (given("b") + begun)["new/0"] <= 45, "half of it, half-way"


def test_without_slow_start_an_empty_rank_is_filled_until_it_has_caught_up(
    join: Join, dispatcher: Dispatcher, clock: Clock
) -> None:
    join("old", 2).report(1, held((50_000, 50), (50_000, 50)))
    clock.move(1)
    join("new", 1)
    assert {dispatcher.dispatch(f"r{i}", 1_000).rank for i in range(40)} == {"new/0"}


def test_slow_start_ends_and_ordinary_dispatch_is_ordinary_again(
    join: Join, dispatcher: Dispatcher, admin: PoolAdmin, clock: Clock, client: redis.Redis
) -> None:
    admin.configure(slow_start_ms=1_000)
    engine = join("e", 2)
    dispatcher.dispatch("a", 1)
    assert client.hget("dpb:{p}:pool", "ordinary") is None
    clock.move(1_000)
    engine.report(1, held((0, 0), (0, 0)))
    with Dispatcher(dispatcher._store.settings) as other:  # the first asks for loads, the next does not
        other.dispatch("b", 1)
    assert client.hget("dpb:{p}:pool", "ordinary")


# -- settings


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("equal", "equal"),
        ("big=2,old/3=0.5", "big=2,old/3=0.5"),
        ({"big": 2, "old/3": 0.5}, "big=2,old/3=0.5"),
        ({}, "equal"),
        ("big=0.250000", "big=0.25"),
    ],
)
def test_weights_are_stored_as_a_person_would_write_them(value: object, stored: str) -> None:
    assert checked_settings({"weights": value}) == {"weights": stored}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": "big"}, "'big' is no weight: write ENGINE=WEIGHT"),
        ({"weights": "big=0"}, "weight of big must be a number between 0.01 and 100, not '0'"),
        ({"weights": "big=nan"}, "weight of big"),
        ({"weights": "big=1,big=2"}, "weights name big twice"),
        ({"weights": "a b=1"}, "engine name 'a b'"),
        ({"weights": "big/x=1"}, "'big/x' is no rank"),
        ({"weights": 3}, "weights must be NAME=WEIGHT"),
        ({"weights": ",".join(f"e{i}=2" for i in range(1_025))}, "1024 engines and ranks at most"),
        ({"envelope.k": "much"}, "envelope.k must be a number between 0 and 1e"),
        ({"envelope.k": -1}, "envelope.k must be"),
        ({"envelope.k": True}, "envelope.k must be"),
        ({"envelope.z": 1}, "no setting 'envelope.z': there are policy"),
        ({"slow_start_ms": -1}, "slow_start_ms must be between 0"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        checked_settings(changes)
    assert says in str(refused.value)


def test_a_policys_header_names_its_parameters_and_no_others() -> None:
    for policy in policies().values():
        assert set(policy.meanings) == set(policy.defaults), policy.name
        assert 20 < len(policy.summary) <= 72, policy.summary


def test_a_parameter_has_one_default() -> None:
    told: dict[str, set[str]] = {}
    for file in lua_directory().rglob("*.lua"):
        for name, default in re.findall(r"parameter\('([\w.]+)', ([\d.]+)\)", file.read_text()):
            told.setdefault(name, set()).add(default)
    assert told.keys() >= {"envelope.k", "cost_envelope.k"}
    assert {name: defaults for name, defaults in told.items() if len(defaults) > 1} == {}


def test_a_policy_is_one_file_and_one_line_in_a_table() -> None:
    others = [path for path in lua_directory().rglob("*.lua") if path.parent.name != "policies"]
    for name in ("random", "minimum_requests", "power_of_two", "cost_envelope"):  # the others have a short way too
        code = [re.sub("--.*", "", line).strip() for path in others for line in path.read_text().splitlines()]
        mentions = [line for line in code if re.search(rf"\b{name}\b", line)]
        assert mentions == [f"{name} = {name},"]
    assert [parameter for parameter in parameters() if parameter.startswith("envelope.")] == ["envelope.k"]


# -- the command


@pytest.fixture
def address(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment, as on an operator's machine."""
    monkeypatch.setenv("DP_BALANCER_URL", str(settings.url))


@pytest.mark.usefixtures("address")
def test_the_command_shows_the_choices_and_changes_the_choice(
    join: Join, admin: PoolAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    join("e", 2)
    assert main(["policy", "p"]) == 0
    shown = capsys.readouterr().out
    assert "*  envelope" in shown
    assert all(name in shown for name in policies())
    assert main(["policy", "p", "envelope", "k=0.5"]) == 0
    assert capsys.readouterr().out == "policy envelope k=0.5 (was envelope k=0.25)\n"
    assert (admin.snapshot().settings.policy, admin.snapshot().settings.parameters) == ("envelope", {"envelope.k": 0.5})
    assert main(["policy", "--pool", "p", "k=0.25"]) == 0, "the policy that is chosen"
    assert capsys.readouterr().out == "policy envelope k=0.25 (was envelope k=0.5)\n"
    assert main(["policy", "--pool", "p", "random"]) == 0
    assert main(["configure", "p"]) == 0
    assert "envelope.k" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nobody", "no policy 'nobody': there are cost_envelope, envelope"),
        ("envelope random", "one policy at a time, not envelope and random"),
        ("envelope slack=2", "envelope has no parameter 'slack': k=0.25"),
        ("random k=2", "random has no parameter 'k': it has none"),
        ("envelope k=2 k=3", "k is given twice"),
        ("envelope k=", "envelope.k must be a number"),
    ],
)
@pytest.mark.usefixtures("address")
def test_the_command_says_what_is_wrong(join: Join, capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    join("e", 2)
    assert main(["policy", "p", *words.split()]) == 2
    assert says in capsys.readouterr().err
