"""What a whole run takes: one of a single step, a longer one, and two of these side by side with a thread each."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gradexp.runs import Paths
from gradexp.tasks.compose import compose_run, plan
from gradexp.tasks.many import run_all
from gradexp.tasks.timing import medians

# Cross-entropy of VGG-4 on 50 digits. A run that is alone takes every core otherwise, and two can only share them.
RUN = ("experiment=jacobian_distill", "method=ce", "data.per_class=5", "scale=quick", "logger=none", "trainer.threads=1")


@dataclass(frozen=True)
class Row:
    passes: int
    one_step: float  # seconds of a run of one step
    alone: float  # seconds of one run of `passes`
    beside: float  # seconds of two

    @property
    def ratio(self) -> float:
        return self.beside / self.alone


def measure(*, passes: int, rounds: int) -> Row:
    """Medians over `rounds`, from the command to the last record: start-up, training, evaluation, records."""
    trainings = {
        "one step": lambda: _train(1, seeds=1),  # on 50 images, a pass is one step
        "alone": lambda: _train(passes, seeds=1),
        "beside": lambda: _train(passes, seeds=2),
    }
    seconds, _ = medians(trainings, rounds=rounds, cuda=False)
    return Row(passes, seconds["one step"], seconds["alone"], seconds["beside"])


def _train(passes: int, *, seeds: int) -> None:
    """As many runs as `seeds`, with a worker each."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = [*RUN, f"optim.passes={passes}", f"paths.results={root / 'results'}", f"paths.outputs={root / 'outputs'}"]
        runs = [plan([*words, f"seed={seed}"]) for seed in range(seeds)]
        with contextlib.redirect_stdout(io.StringIO()):
            failures = run_all(runs, Paths.of(compose_run(words)), workers=seeds)
        if failures:
            raise RuntimeError(f"{failures[0].command} failed:\n{failures[0].log.read_text()}")


def markdown(row: Row) -> str:
    return (
        "# Whole runs\n\n"
        f"From the command to the record, a run of one step takes {row.one_step:.1f} s: start-up and evaluation.\n\n"
        f"One run of {row.passes} passes takes {row.alone:.1f} s, two with WORKERS=2 take {row.beside:.1f} s: "
        f"{row.ratio:.2f} times as long, start-up and evaluation included, each with one thread.\n"
    )
