"""Engines without a hook: several replicas speak for them without a fight, and stop when nobody reaches them."""

from __future__ import annotations

from collections.abc import Callable

import redis

from balancer import EngineState, PoolAdmin, RankCounts, Reporter, Settings
from balancer.serve import parse_engine
from balancer.serve.stand_in import incarnation_of
from tests.unit.serve_cast import ask, mock_engine, replica, until

Join = Callable[..., Reporter]
ASK = {"prompt": "hello", "max_tokens": 2}


async def test_all_replicas_share_one_life_of_an_engine(settings: Settings, admin: PoolAdmin) -> None:
    async with mock_engine(4) as (_, port):
        word = f"http://127.0.0.1:{port},kind=sglang,dp=4"
        async with replica(settings, word) as (first, at), replica(settings, word) as (second, _):
            placement = await first.bookings.place("held", 500)
            (engine,) = admin.snapshot().engines
            began = engine.reported_ms
            await until(lambda: admin.snapshot().engines[0].reported_ms > began + 1_500, "both have reported again")
            (engine,) = admin.snapshot().engines
            assert (engine.epoch, engine.state, engine.address) == (
                admin.snapshot().engines[0].epoch,
                EngineState.UP,
                f"127.0.0.1:{port}",
            )
            loads = {rank.rank: rank.load_tokens for rank in admin.snapshot().ranks}
            assert loads[placement.rank] == 500, "no report, join or replica has wiped out a booking"
            assert await second.bookings.place("other", 1)
            assert (await ask(at, "/v1/completions", ASK)).status == 200


async def test_a_replica_that_comes_later_joins_the_same_life(settings: Settings, admin: PoolAdmin) -> None:
    async with mock_engine() as (_, port):
        word = f"http://127.0.0.1:{port},kind=sglang,dp=2"
        async with replica(settings, word) as (first, _):
            epoch = admin.snapshot().engines[0].epoch
            await first.bookings.place("held", 500)
            async with replica(settings, word) as (second, _):
                await until(lambda: second.targets[0].stand_in.has_joined, "the second has joined")
                assert admin.snapshot().engines[0].epoch == epoch
                assert sum(rank.load_tokens for rank in admin.snapshot().ranks) == 500


async def test_an_engine_that_nobody_reaches_loses_its_lease_and_comes_back(
    settings: Settings, admin: PoolAdmin
) -> None:
    async with mock_engine() as (_, port):
        word = f"http://127.0.0.1:{port},kind=sglang,dp=2"
        made = replica(settings, word)
        await made.__aenter__()
    try:
        admin.configure(engine_lease_ms=500)
        await until(lambda: admin.snapshot().engines[0].state is EngineState.SILENT, "it is silent")
        async with mock_engine(port=port):
            await until(lambda: admin.snapshot().engines[0].state is EngineState.UP, "it is up again")
    finally:
        await made.__aexit__(None, None, None)


async def test_an_emptied_redis_is_filled_again(settings: Settings, admin: PoolAdmin, client: redis.Redis) -> None:
    async with mock_engine() as (_, port):
        word = f"http://127.0.0.1:{port},kind=sglang,dp=2"
        async with replica(settings, word) as (_, at), replica(settings, word):
            client.flushall()
            await until(lambda: client.exists("dpb:{p}:engines"), "the engine is known again")
            assert (await ask(at, "/v1/completions", ASK)).status == 200
            epochs = {admin.snapshot().engines[0].epoch for _ in range(5)}
            assert len(epochs) == 1


async def test_a_hook_that_reports_under_the_name_is_not_thrown_out(
    settings: Settings, join: Join, admin: PoolAdmin
) -> None:
    hook = join("e", 2)
    hook.report(7, [RankCounts(100, 1), RankCounts(200, 2)])
    async with (
        mock_engine() as (_, port),
        replica(settings, f"http://127.0.0.1:{port},kind=sglang,dp=2,name=e") as (made, _),
    ):
        await until(lambda: made.targets[0].stand_in._complained, "the operator is told")
        assert "hook=e" in made.targets[0].stand_in._complained
        hook.report(8, [RankCounts(101, 1), RankCounts(201, 2)])  # not fenced
        assert [rank.holding_tokens for rank in admin.snapshot().ranks] == [101, 201]


async def test_an_engine_with_a_hook_is_left_to_it(settings: Settings, join: Join, admin: PoolAdmin) -> None:
    hook = join("e", 2)
    async with (
        mock_engine() as (_, port),
        replica(settings, f"http://127.0.0.1:{port},kind=vllm,dp=2,hook=e") as (_, at),
    ):
        hook.report(1, [RankCounts(10, 1), RankCounts(5, 1)])
        answer = await ask(at, "/v1/completions", ASK)
        assert answer.headers["x-balancer-rank"] == "e/1"
        assert admin.snapshot().engines[0].epoch == hook.incarnation.epoch


def test_the_shared_life_follows_from_name_and_size_alone() -> None:
    one, other = parse_engine("http://a:1,kind=vllm,dp=2"), parse_engine("http://a:1,kind=sglang,dp=2")
    assert incarnation_of(one) == incarnation_of(other)
    assert incarnation_of(one).nonce != incarnation_of(parse_engine("http://a:1,kind=vllm,dp=4")).nonce
