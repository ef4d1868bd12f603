"""The scripts that a dispatch is compared with."""

from __future__ import annotations

from tests.bench.pool import BenchPool, Command

NO_OP = "return 1"

BOOKING_ONLY = """
-- What any exact dispatch must write, and nothing else: the booking, its deadline, the two counts of one fixed rank.
local time = redis.call('TIME')
local deadline = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000) + 604800000)
redis.call('HSET', KEYS[9], ARGV[3], 'RANK ' .. ARGV[4] .. ' 1790000000000 ' .. ARGV[1] .. ' ' .. ARGV[5])
redis.call('ZADD', KEYS[10], deadline, ARGV[3])
redis.call('HINCRBY', KEYS[7], 'RANK', ARGV[4])
redis.call('HINCRBY', KEYS[8], 'RANK', '1')
return 'RANK'
"""


def no_op(pool: BenchPool, like: Command = ()) -> Command:
    """`return 1`; with the keys and arguments of the command `like`, where one is given."""
    return ("EVALSHA", pool.redis.script_load(NO_OP), *(like[2:] or (0,)))


def booking_only(pool: BenchPool, like: Command) -> Command:
    """BOOKING_ONLY on a rank in the middle, with the keys and arguments of the dispatch `like`."""
    text = BOOKING_ONLY.replace("RANK", f"sglang-0/{pool.ranks // 2}")
    return ("EVALSHA", pool.redis.script_load(text), *like[2:])
