"""What whole runs take: a command for a single step, a longer run, and two of these side by side with a thread each."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.timing import medians
from gradexp.engine.compose import plan
from gradexp.engine.launchers import run_all
from gradexp.engine.run import ROOT

# Cross-entropy of VGG-4 on 50 digits. A run that is alone takes every core otherwise, and two can only share them.
RUN = ("experiment=jacobian_distill", "method=ce", "data.per_class=5", "scale=quick", "logger=none", "trainer.threads=1")


@dataclass(frozen=True)
class Row:
    passes: int
    one_step: float  # seconds of `python run.py` for one step
    alone: float  # seconds of one run of `passes`
    beside: float  # seconds of two

    @property
    def ratio(self) -> float:
        return self.beside / self.alone


def measure(*, passes: int, rounds: int) -> Row:
    """Medians over `rounds`: to the last record, evaluation included."""
    trainings = {
        "one step": _one_step,
        "alone": lambda: _train(passes, seeds=1),
        "beside": lambda: _train(passes, seeds=2),
    }
    seconds, _ = medians(trainings, rounds=rounds, cuda=False)
    return Row(passes, seconds["one step"], seconds["alone"], seconds["beside"])


def _words(passes: int, root: Path) -> list[str]:
    return [*RUN, f"optim.passes={passes}", f"paths.results={root / 'results'}", f"paths.outputs={root / 'outputs'}"]


def _one_step() -> None:
    """A fresh interpreter, as a user starts it. On 50 images, a pass is one step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run.py"), *_words(1, Path(folder))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def _train(passes: int, *, seeds: int) -> None:
    """As many runs as `seeds`, with a worker each: forked, as those of a table, from a server that has its imports."""
    with tempfile.TemporaryDirectory() as folder:
        words = _words(passes, Path(folder))
        runs = [plan([*words, f"seed={seed}"]) for seed in range(seeds)]
        with contextlib.redirect_stdout(io.StringIO()):
            failures = run_all(runs, workers=seeds)
        if failures:
            raise RuntimeError(f"{failures[0].command} failed:\n{failures[0].log.read_text()}")


def markdown(row: Row) -> str:
    return (
        "# Whole runs\n\n"
        f"`python run.py` for one step takes {row.one_step:.1f} s, imports and evaluation included. A table's runs share the "
        f"imports: one run of {row.passes} passes takes {row.alone:.1f} s, two with WORKERS=2 take {row.beside:.1f} s, "
        f"{row.ratio:.2f} times as long, each with one thread.\n"
    )
