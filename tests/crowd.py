"""How crowded this machine is: what tests grant to times that a quiet one keeps."""

import os


def crowd() -> float:
    """How often what two cores with ordinary company may add is to be granted, by what waits for a core: 1 to 5."""
    return min(5.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1) / 3))
