"""What this process has used, seconds of the wall clock and of processors, and memory; how long the rest will take."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

CLOCKS = ("wall", "cpu")
INTERVAL = 30.0  # seconds between lines of progress


def read() -> dict[str, float]:
    return {"wall": time.monotonic(), "cpu": time.process_time()}


def since(begun: dict[str, float]) -> dict[str, float]:
    """Seconds of each clock since it was read."""
    return {clock: now - begun[clock] for clock, now in read().items()}


def peak_memory_mib() -> int:
    """The peak memory of this process."""
    status = Path("/proc/self/status")  # on Linux, where getrusage includes memory of the parent process
    if match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else ""):
        return round(int(match[1]) / 2**10)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def peak_memory() -> dict[str, int]:
    """The peak memory of this process and of its GPU, as in a record."""
    import torch  # not at the top: commands that only read records do without it

    gpu = {"peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20} if torch.cuda.is_available() else {}
    return {"peak_memory_mib": peak_memory_mib(), **gpu}


class Progress:
    """Prints now and then how many of `total` parts are done, and how long the rest takes at the same speed."""

    def __init__(self, title: str, total: int, parts: str, *, done: int = 0) -> None:
        self.title, self.total, self.parts, self.first = title, total, parts, done
        self._begun = self._printed = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._printed < INTERVAL:
            return
        self._printed = now
        left = (now - self._begun) / max(1, done - self.first) * (self.total - done)
        print(f"{self.title}: {done}/{self.total} {self.parts}{note}, {left / 60:.1f} min left", flush=True)
