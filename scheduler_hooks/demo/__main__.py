"""`python -m scheduler_hooks.demo`, which is `balancer demo`. Exit codes as the command line's: 0, 1, 2, 3."""

import signal
import sys
from collections.abc import Sequence

from balancer import BalancerError, InvalidInput, StoreError
from scheduler_hooks.demo.run import parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; every way out, Ctrl-C and SIGTERM included, takes the processes along."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(parser().parse_args(arguments))
    except BalancerError as error:
        print(f"balancer demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 3 if isinstance(error, StoreError) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
