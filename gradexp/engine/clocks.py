"""What this process has used: seconds of the wall clock and on processors, and memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

CLOCKS = ("wall", "cpu")


def read() -> dict[str, float]:
    return {"wall": time.monotonic(), "cpu": time.process_time()}


def since(begun: dict[str, float]) -> dict[str, float]:
    """Seconds of each clock since it was read."""
    return {clock: now - begun[clock] for clock, now in read().items()}


def peak_memory_mib() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")  # of Linux, where getrusage begins with what the process's parent had
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else ""):
        return round(int(found[1]) / 2**10)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
