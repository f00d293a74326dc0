"""Progress of a loop other than a training."""

from __future__ import annotations

import time

INTERVAL = 30.0  # seconds between lines


class Progress:
    """Prints now and then how many of `total` parts are done, and how long the rest takes at the same speed."""

    def __init__(self, title: str, total: int, parts: str, *, done: int = 0) -> None:
        self.title, self.total, self.parts, self.first = title, total, parts, done
        self._begun = self._printed = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self._printed < INTERVAL:
            return
        self._printed = now
        left = (now - self._begun) / (done - self.first) * (self.total - done)
        print(f"{self.title}: {done}/{self.total} {self.parts}, {left / 60:.1f} min left", flush=True)
