"""`python -m tests.property.soak --operations 1000000 --seed 7`: the exactness test at length, on a Redis of its own.

Programs of a few hundred steps each, one seed each, counted up from --seed; a failure prints the line that replays it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from balancer.embedded import EmbeddedRedis
from tests.property.program import Program, told
from tests.property.wire import Wire

STEPS_PER_PROGRAM = 250


def run_program(wire: Wire, seed: int) -> int:
    """One program to its end; returns how many operations it made."""
    program = Program(wire, random.Random(seed).randrange)
    with told(program, f"replay: python -m tests.property.soak --operations 1 --seed {seed}"):
        for _ in range(STEPS_PER_PROGRAM):
            program.step()
        program.finish()
    return program.operations


def soak(wire: Wire, operations: int, seed: int, progress: bool = False) -> tuple[int, int]:
    """Programs until there are so many operations; returns operations and programs."""
    began, told_at, done, programs = time.monotonic(), time.monotonic(), 0, 0
    while done < operations:
        done += run_program(wire, seed + programs)
        programs += 1
        if progress and (time.monotonic() - told_at > 5 or done >= operations):
            told_at = time.monotonic()
            print(f"{done:,} operations, {programs} programs, {done / (told_at - began):,.0f}/s", flush=True)
    return done, programs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="at least so many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the first program (default: a random one)")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with EmbeddedRedis() as server:
        wire = Wire(server.url)
        try:
            soak(wire, given.operations, seed, progress=True)
        except AssertionError as error:
            print(f"FAILED {error}", file=sys.stderr)
            return 1
        finally:
            wire.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
