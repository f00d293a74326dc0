"""Probes: the cost of a run, measured on its first steps, in a temporary folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from gradexp.base.errors import UserError
from gradexp.engine import clocks
from gradexp.engine.assemble import make_data
from gradexp.engine.ensure import ensure, finish
from gradexp.engine.launchers import start_process
from gradexp.engine.record import Record
from gradexp.engine.run import Config, Paths, Run
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.tasks.train import facts_of, prepare

WARM, STEPS = 5, 20  # the first steps allocate memory and choose algorithms


def training(config: Config, paths: Paths) -> dict[str, Any]:
    """What `STEPS` steps of the run's training cost in this process, after `WARM` others.

    `seconds`, of the processor and of the wall clock: until the first step (`ready`, which includes a teacher's targets), for
    an image, and to evaluate the test set (`judge`); `data`, `parameters`, `peak_memory_mib` and the hardware as in a record.
    """
    run = Run(_without_removal(config), paths)
    make_data(run)  # converts a data set on its first use, which is no cost of this run
    upstream = {name: finish(below) for name, below in run.upstream.items()}
    begun = _clock()
    training = prepare(run, upstream)
    ready, watch = _clock(), _Watch()
    training.fit(None, watch, steps=WARM + STEPS)
    trained = _clock()
    accuracy_on_test(training.module.student, training.data, training.hardware.device)
    images = watch.images[-1] - watch.images[WARM - 1]
    spans = {
        "ready": (begun, ready, 1),
        "image": (watch.clocks[WARM - 1], watch.clocks[-1], images),
        "judge": (trained, _clock(), 1),
    }
    seconds = {name: {kind: (end[kind] - start[kind]) / n for kind in start} for name, (start, end, n) in spans.items()}
    facts = facts_of(training, WARM + STEPS)
    return {"seconds": seconds, "peak_memory_mib": clocks.peak_memory_mib(), **facts}


def looking(configs: Sequence[Config], paths: Paths) -> list[Record]:
    """The records of these runs."""
    return [ensure(Run(config, paths)) for config in configs]


def in_its_own_process(function: Any, config: Any, paths: Paths, *, threads: int) -> Any:
    """Calls function(config, paths) with a temporary results folder, in a process of its own, whose peak memory is measured.

    Upstream models that have been trained are used; others are trained for one step. Raises UserError where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Paths(paths.data, Path(folder) / "results", Path(folder) / "outputs")
        _link_cache(paths, elsewhere)
        if isinstance(config, list):
            config = [_with_upstream(each, paths, elsewhere) for each in config]
        else:
            config = _with_upstream(config, paths, elsewhere)
        file = Path(folder) / "answer.json"
        process = start_process(_answer, function, config, elsewhere, threads, file)
        process.join()
        answer = json.loads(file.read_text()) if file.exists() else {"error": f"it ended with exit code {process.exitcode}"}
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _answer(function: Any, config: Any, paths: Paths, threads: int, file: Path) -> None:
    torch.set_num_threads(threads)
    try:
        answer = {"value": function(config, paths)}
    except Exception as error:  # the plan continues without this probe
        answer = {"error": (str(error) or type(error).__name__).splitlines()[0]}
    file.write_text(json.dumps(answer))


def _link_cache(paths: Paths, elsewhere: Paths) -> None:
    """Shares converted data sets, but not teachers' targets: the teacher of a probe may be trained for one step."""
    elsewhere.cache.mkdir(parents=True)
    for entry in paths.cache.iterdir() if paths.cache.is_dir() else ():
        if entry.name != "targets":
            (elsewhere.cache / entry.name).symlink_to(entry)


def _with_upstream(config: Config, paths: Paths, elsewhere: Paths) -> Config:
    """The config with upstream runs that are finished, which are linked into `elsewhere`, or that train for one step."""
    upstream = {name: _with_upstream(run, paths, elsewhere) for name, run in config["upstream"].items()}
    for name, run in config["upstream"].items():
        here, there = Run(run, paths), Run(run, elsewhere)
        if here.finished and here.weights.exists() and name != "maps":
            upstream[name] = run
            for source, link in ((here.record_path, there.record_path), (here.folder, there.folder)):
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(source)
        elif "optim" in run:
            upstream[name] = upstream[name] | {"optim": run["optim"] | {"steps": 1, "passes": None}}
    return config | {"upstream": upstream}


def _without_removal(config: Config) -> Config:
    """The config without removal of pixels, which costs nothing, so that its maps need not be computed."""
    upstream = {name: run for name, run in config["upstream"].items() if name != "maps"}
    return config | {"upstream": upstream, "data": config["data"] | {"removal": None}}


class _Watch(lightning.Callback):
    """Reads the clocks, and counts images, after each step."""

    def __init__(self) -> None:
        self.clocks: list[Mapping[str, float]] = []
        self.images: list[int] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.images.append(len(batch[0]) + (self.images[-1] if self.images else 0))
        self.clocks.append(_clock())


def _clock() -> dict[str, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clocks.read()
