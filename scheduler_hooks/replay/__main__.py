"""`python -m scheduler_hooks.replay`, which is `balancer replay`. Exit codes as the command line's: 0, 1, 2, 3."""

import signal
import sys
from collections.abc import Sequence

from balancer import BalancerError, InvalidInput, StoreError
from balancer.workload import WorkloadError
from scheduler_hooks.replay.options import parser
from scheduler_hooks.replay.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the replay; every way out, Ctrl-C and SIGTERM included, takes the processes along."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(parser().parse_args(arguments))
    except BalancerError as error:
        print(f"balancer replay: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput | WorkloadError) else 3 if isinstance(error, StoreError) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
