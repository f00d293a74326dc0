"""Checkpoints and progress, both by the clock: a short pass costs nothing, a long one loses little."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
REFRESH_EVERY = 0.5  # seconds between updates of the bar


class Checkpointer(lightning.Callback):
    """Saves the whole training state every so many seconds; remembers the seconds that earlier attempts took."""

    def __init__(self, path: Path, *, every: float) -> None:
        self.path, self.every = path, every
        self.earlier = {"wall": 0.0, "cpu": 0.0}
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if time.monotonic() - self._saved >= self.every:
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(draft)
        if trainer.is_global_zero:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(self.path)
        self._saved = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        spent = {"wall": time.monotonic() - self._wall, "cpu": time.process_time() - self._cpu}
        return {name: self.earlier[name] + seconds for name, seconds in spent.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.earlier = state


class ProgressLine(lightning.Callback):
    """One bar a run with the time left; plain lines where standard output is not a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.images = 0
        self.seconds = 0.0
        self._bar: Progress | None = None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._begun = self._shown = time.monotonic()
        self._first = trainer.global_step
        if trainer.is_global_zero and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, TextColumn("{task.fields[note]}"), refresh_per_second=2)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self._first, note="")
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.images += len(batch[0])
        now = time.monotonic()
        self.seconds = now - self._begun
        if now - self._shown < (REFRESH_EVERY if self._bar else PLAIN_EVERY) or not trainer.is_global_zero:
            return
        self._shown = now
        losses = module.curves.get("train/loss", [])
        note = f"{self.images_per_second:.0f} images/s" + (f", loss {losses[-1]:.4g}" if losses else "")
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, note=note)
        else:
            done = trainer.global_step
            left = (self.total - done) * self.seconds / max(1, done - self._first)
            print(f"{self.title}: step {done}/{self.total}, {note}, {left / 60:.1f} min left", flush=True)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step)
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
