"""Works for launchers, which do nothing but end as a run would. Few imports: every process imports this file."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType


class Endless:
    """Runs until SIGTERM, then leaves a checkpoint; notes how often it was begun."""

    def __init__(self, overrides: tuple[str, ...], log: Path, waits: bool) -> None:
        self.log = log

    def __call__(self, threads: int) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.with_name("begun").open("a") as file:
            file.write(f"after a checkpoint: {self.log.with_name('last.ckpt').exists()}\n")
        time.sleep(600)

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.log.with_name("last.ckpt").touch()
        self.log.write_text("stopped by SIGTERM; the same command resumes from the last checkpoint\n")
        sys.exit(143)


class Deaf(Endless):
    """Ignores SIGTERM, as a process that hangs would."""

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.log.with_name("heard").touch()


class Failing(Endless):
    def __call__(self, threads: int) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("error: something is wrong\n")
        sys.exit(1)
