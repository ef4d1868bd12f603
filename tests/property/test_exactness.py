"""Whatever dispatchers, engines, operators and clocks do, in any order: all keys hold what a dict and sums say."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer.embedded import EmbeddedRedis
from tests.property.program import Program, told
from tests.property.soak import STEPS_PER_PROGRAM, soak
from tests.property.wire import Wire

OPERATIONS, SEED = 20_000, 1


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with EmbeddedRedis() as server:
        wire = Wire(server.url)
        yield wire
        wire.close()


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data(), length=st.integers(1, 25))
def test_short_programs_that_hypothesis_can_shrink_leave_every_key_exact(
    wire: Wire, data: st.DataObject, length: int
) -> None:
    program = Program(wire, lambda limit: data.draw(st.integers(0, limit - 1)))
    with told(program, "(hypothesis prints the choices above)"):
        for _ in range(length):
            program.step()
        program.finish()


def test_tens_of_thousands_of_random_operations_leave_every_key_exact(wire: Wire) -> None:
    operations, programs = soak(wire, OPERATIONS, SEED)
    assert operations >= OPERATIONS
    assert programs > 50


def test_a_program_is_the_same_whenever_it_is_drawn_from_the_same_seed(wire: Wire) -> None:
    assert played(wire, SEED) == played(wire, SEED)
    assert played(wire, SEED) != played(wire, SEED + 1)


def played(wire: Wire, seed: int) -> tuple[list[str], list[object]]:
    """What a program of this seed did, and what all keys held after each of its steps."""
    program, keys = Program(wire, random.Random(seed).randrange), []
    for _ in range(STEPS_PER_PROGRAM):
        program.step()
        keys.append(program.operations and program.contents()[0])
    assert program.operations > STEPS_PER_PROGRAM / 2
    return program.log, keys
