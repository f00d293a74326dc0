"""Checkpoints and progress of a training, both at intervals of time."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.progress import Progress as Bar
from rich.progress import TextColumn

from gradexp.base.errors import Stopped
from gradexp.base.files import draft_of, intact, remove_drafts, write_sealed
from gradexp.engine import clocks
from gradexp.engine.exits import die_of_interrupt
from gradexp.layers import ranks

# Sent by: the user or the system; SLURM, before the end of a job (USR1; USR2 where submitit asks for it); Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
REFRESH_EVERY = 0.5  # seconds between updates


def call_handler(number: int, handler: Any, checkpoint: Path) -> None:
    """Calls the handler that a signal had before the training. Raises Stopped where it had none."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)
        return
    written = "the same command resumes from the last checkpoint"
    after = written if checkpoint.exists() else "there is no checkpoint yet; the same command starts the training again"
    raise Stopped(f"stopped by {signal.Signals(number).name}; {after}", number)


class Checkpointer(lightning.Callback):
    """Saves the training state every `every` seconds, and after a signal of SIGNALS.

    After a signal's checkpoint, the handler that the signal had before is called (submitit's requeues the job); without one,
    Stopped is raised. Stores the seconds and the origins (code, hardware, upstream) of all attempts.
    """

    def __init__(self, path: Path, *, every: float, run: str = "", origin: dict[str, Any] | None = None) -> None:
        self.path, self.every, self.run, self.origin = path, every, run, origin or {}
        self.earlier = dict.fromkeys(clocks.CLOCKS, 0.0)
        self.attempts: list[dict[str, Any]] = []  # earlier ones whose origin was another
        self._begun = clocks.read()
        self._saved = time.monotonic()
        self._signal: int | None = None
        self._noticed = 0.0  # when it came
        self.before: dict[int, Any] = {}  # handlers of the signals outside the training

    def notice_signals(self, before: dict[int, Any]) -> None:
        """Handles the signals from now on. before: their handlers so far; ignored signals stay ignored."""
        self.before = before
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._notice)

    def on_train_start(self, *_: Any) -> None:
        self.notice_signals(self.before)  # instead of Lightning's handlers, which communicate between processes

    def _notice(self, number: int, _: Any) -> None:
        """Keeps the signal for the end of the step. A second Ctrl-C, of an impatient user, ends the process now."""
        if self._signal == number == signal.SIGINT and time.monotonic() - self._noticed > 1:
            die_of_interrupt()
        if self._signal is None:
            self._signal, self._noticed = number, time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        late = time.monotonic() - self._saved >= self.every
        if not ranks.any_of(late or self._signal is not None):
            return
        self.save(trainer)
        self._stop_if_signalled()

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.world_size > 1:
            self.save(trainer)  # the result of the processes
            self._stop_if_signalled()

    def after_training(self, trainer: lightning.Trainer) -> None:
        """Stops after a signal that came between the last step and the end of Lightning's work."""
        if trainer.world_size == 1 and self._signal is not None:
            self.save(trainer)
            self._stop_if_signalled()

    def _stop_if_signalled(self) -> None:
        if ranks.any_of(self._signal is not None):
            number, self._signal = self._signal or signal.SIGTERM, None
            call_handler(number, self.before.get(number), self.path)

    def save(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            write_sealed(self.path, trainer.save_checkpoint)
        else:  # all processes take part, and the first one writes
            trainer.save_checkpoint(draft_of(self.path))
        self._saved = time.monotonic()

    def usable(self) -> bool:
        """Whether there is a checkpoint to resume from; a damaged one, or that of another run, is renamed."""
        remove_drafts(self.path, 0)  # of attempts that were killed: the caller holds the run's lock
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu") if intact(self.path) else {}
            owner = state["callbacks"]["Checkpointer"].get("run", self.run)  # checkpoints before 2026-11-29 lack it
        except Exception:  # torch raises whatever its readers of archives do
            owner = None
        if owner == self.run:
            return True
        aside = self.path.with_suffix(".damaged")
        self.path.replace(aside)
        fault = "damaged" if owner is None else f"that of run {owner}"
        print(f"checkpoint {aside} is {fault}, so it is set aside: training begins anew", flush=True)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Called in every process; `cpu` is the sum over all of them."""
        spent = clocks.since(self._begun)
        spent["cpu"] = ranks.sum_of(spent["cpu"])
        total = {clock: self.earlier[clock] + seconds for clock, seconds in spent.items()}
        return {**total, "run": self.run, "attempts": [*self.attempts, self.origin]}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:
            print(f"resumes after step {checkpoint['global_step']}, from {self.path}", flush=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier = {clock: state[clock] for clock in clocks.CLOCKS}
        self.attempts = [origin for origin in state.get("attempts", []) if origin != self.origin]


class ProgressLine(lightning.Callback):
    """A progress bar with the time left; plain lines where standard output is not a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.images = 0
        self.seconds = 0.0
        self.memory: dict[str, int] = {}  # the most that this and other processes used
        self._bar: Bar | None = None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._begun = self._shown = time.monotonic()
        self._lines = clocks.Progress(self.title, self.total, "steps", done=trainer.global_step)
        if trainer.is_global_zero and sys.stdout.isatty():
            columns = (*Bar.get_default_columns(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, refresh_per_second=2)
            self._task = self._bar.add_task(self.title, total=self.total, completed=trainer.global_step, note="")
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.images += batch.share[1] if batch.share else len(batch.images)
        now = time.monotonic()
        self.seconds = now - self._begun
        if now - self._shown < REFRESH_EVERY or not trainer.is_global_zero:
            return
        self._shown = now
        losses = module.curves.get("train/loss", [])
        note = f"{self.images_per_second:.0f} images/s" + (f", loss {losses[-1]:.4g}" if losses else "")
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, note=note)
        else:
            self._lines.update(trainer.global_step, f", {note}")

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step)
            self._bar.stop()

    def on_exception(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def state_dict(self) -> dict[str, float]:
        return {"images": self.images, "seconds": self.seconds, **clocks.peak_memory()}

    def load_outcome(self, state: dict[str, float]) -> None:
        """Loads the state of another process."""
        self.images, self.seconds = int(state["images"]), state["seconds"]
        self.memory = {name: max(int(state[name]), here) for name, here in clocks.peak_memory().items()}
