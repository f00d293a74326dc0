"""What time costs: seconds of the wall clock, and of this process on processors."""

from __future__ import annotations

import time

CLOCKS = ("wall", "cpu")


def read() -> dict[str, float]:
    return {"wall": time.monotonic(), "cpu": time.process_time()}


def since(begun: dict[str, float]) -> dict[str, float]:
    """Seconds of each clock since it was read."""
    return {clock: now - begun[clock] for clock, now in read().items()}
