"""`python -m scheduler_hooks.replay`, which is `balancer replay`: errors and Ctrl-C end as every verb's."""

import signal
import sys
from collections.abc import Sequence

from balancer.cli import main as command_line
from scheduler_hooks.replay.options import parser
from scheduler_hooks.replay.run import run


def main(words: Sequence[str] | None = None) -> int:
    """Run the replay; every way out, SIGTERM included, takes the processes along. Raises BalancerError."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(parser().parse_args(words))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(command_line(["replay", *sys.argv[1:]]))
