"""How long two runs side by side take, against one alone, where a run has one thread and so leaves room for another."""

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
    alone: float  # seconds
    beside: float  # seconds, both runs

    @property
    def ratio(self) -> float:
        return self.beside / self.alone


def measure(*, passes: int, rounds: int) -> Row:
    """Medians over `rounds`, from the command to the last record: start-up, training, evaluation, records."""
    seconds, _ = medians(
        {"alone": lambda: _train(passes, seeds=1), "beside": lambda: _train(passes, seeds=2)}, rounds=rounds, cuda=False
    )
    return Row(passes, seconds["alone"], seconds["beside"])


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
        "# Two runs side by side\n\n"
        f"One run of {row.passes} passes takes {row.alone:.1f} s, two with WORKERS=2 take {row.beside:.1f} s: "
        f"{row.ratio:.2f} times as long, start-up and evaluation included, each with one thread.\n"
    )
