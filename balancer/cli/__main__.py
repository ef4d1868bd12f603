"""`python -m balancer.cli`, for machines whose PATH has no `balancer`."""

import sys

from balancer.cli import main

sys.exit(main())
