"""How many processor cores there are to work with. Imports no torch, which takes seconds."""

from __future__ import annotations

import os


def count_cores() -> int:
    """The cores that this process may run on, at least 1; all of the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):  # on Linux: fewer under taskset or a container's cpuset, not by its quota
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
