"""How far a loop outside of training is."""

from __future__ import annotations

import time

SAY_EVERY = 30.0  # seconds


class Progress:
    """A line now and then: how many of `total` parts are done, and how long the rest takes at this pace."""

    def __init__(self, title: str, total: int, parts: str, *, done: int = 0) -> None:
        self.title, self.total, self.parts, self.first = title, total, parts, done
        self._begun = self._said = time.monotonic()

    def say(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < SAY_EVERY:
            return
        self._said = now
        left = (now - self._begun) / (done - self.first) * (self.total - done)
        print(f"{self.title}: {done}/{self.total} {self.parts}, {left / 60:.1f} min left", flush=True)
