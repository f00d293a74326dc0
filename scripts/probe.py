"""Probes: what a run costs, from its first steps. Nothing of a probe is kept but its numbers."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from gradexp.base.errors import UserError
from gradexp.data.loader import TrainingStream
from gradexp.engine import clocks
from gradexp.engine.assemble import make_data
from gradexp.engine.callbacks import Checkpointer, ProgressLine
from gradexp.engine.ensure import ensure, finish
from gradexp.engine.fit import fit
from gradexp.engine.run import Config, Paths, Run
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.tasks.train import prepare
from gradexp.training.dropout import dropout_after

WARM, STEPS = 5, 20  # the first steps allocate memory and choose algorithms


def training(config: Config, paths: Paths) -> Config:
    """What `STEPS` steps of the run's training cost in this process, after `WARM` others.

    `seconds`: of the processor and the wall clock, to get ready (a teacher's targets among them), for an image, and to
    read the test set; `data`, `parameters`, `peak_memory_mib` and the hardware as in a record.
    """
    run = Run(_without_removal(config), paths)
    make_data(run)  # converts a data set on its first use: no cost of this run
    upstream = {name: finish(below) for name, below in run.upstream.items()}
    begun = _clock()
    made = prepare(run, upstream)
    ready = _clock()
    steps, watch = WARM + STEPS, _Watch()
    with dropout_after(made.module.student, run.config["method"].get("dropout"), made.loader.example):
        stream, progress = TrainingStream(made.loader, steps), ProgressLine("probe", steps)
        fit(made.module, stream, made.hardware, None, Checkpointer(run.checkpoint, every=1e9), progress, watch)
    trained = _clock()
    accuracy_on_test(made.module.student, made.data, made.hardware.device)
    images = watch.images[-1] - watch.images[WARM - 1]
    spans = {"ready": (begun, ready, 1), "image": (watch.clocks[WARM - 1], watch.clocks[-1], images)}
    spans |= {"judge": (trained, _clock(), 1)}
    seconds = {name: {kind: (end[kind] - start[kind]) / n for kind in start} for name, (start, end, n) in spans.items()}
    parameters = sum(parameter.numel() for parameter in made.module.student.parameters())
    hardware = made.hardware.facts(mixed=not made.module.full_precision)
    facts = {"parameters": parameters, "peak_memory_mib": clocks.peak_memory_mib(), **hardware}
    return {"seconds": seconds, "data": made.data.fingerprint(), **facts}


def looking(configs: Sequence[Config], paths: Paths) -> list[Config]:
    """The records of these runs."""
    return [ensure(Run(config, paths)) for config in configs]


def in_its_own_process(function: Any, config: Any, paths: Paths, *, threads: int) -> Any:
    """function(config, paths) in a temporary results folder and a process of its own, so that its peak memory is its own.

    Trained upstream models that are at hand are used; others are trained for one step. Raises UserError where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = Paths(paths.data, Path(folder) / "results", Path(folder) / "outputs")
        _link_cache(paths, places)
        configs = config if isinstance(config, list) else [config]
        brief = [_ready(one, paths, places) for one in configs]
        answer = Path(folder) / "answer.json"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gradexp.tasks.train"])
        given = brief if isinstance(config, list) else brief[0]
        process = context.Process(target=_answer, args=(function, given, places, threads, answer))
        process.start()
        process.join()
        found = json.loads(answer.read_text()) if answer.exists() else {"error": f"it ended with exit code {process.exitcode}"}
    if "error" in found:
        raise UserError(found["error"])
    return found["answer"]


def _answer(function: Any, given: Any, places: Paths, threads: int, answer: Path) -> None:
    torch.set_num_threads(threads)
    try:
        found = {"answer": function(given, places)}
    except Exception as error:  # whatever it is, the plan goes on without this probe
        found = {"error": (str(error) or type(error).__name__).splitlines()[0]}
    answer.write_text(json.dumps(found))


def _link_cache(paths: Paths, places: Paths) -> None:
    """Converted data sets are shared, teachers' targets are not: a probe's teacher may be hardly trained."""
    places.cache.mkdir(parents=True)
    for entry in paths.cache.iterdir() if paths.cache.is_dir() else ():
        if entry.name != "targets":
            (places.cache / entry.name).symlink_to(entry)


def _ready(config: Config, paths: Paths, places: Paths) -> Config:
    """The config with upstream runs that are at hand, linked into `places`, or that train for one step."""
    upstream = {name: _ready(run, paths, places) for name, run in config["upstream"].items()}
    for name, run in config["upstream"].items():
        if paths.record(run).exists() and (paths.folder(run) / "weights.pt").exists() and name != "maps":
            upstream[name] = run
            for source, target in ((paths.record(run), places.record(run)), (paths.folder(run), places.folder(run))):
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.symlink_to(source)
        elif "optim" in run:
            upstream[name] = upstream[name] | {"optim": run["optim"] | {"steps": 1, "passes": None}}
    return config | {"upstream": upstream}


def _without_removal(config: Config) -> Config:
    """Pixels are removed for nothing; the maps that say which need not be computed."""
    upstream = {name: run for name, run in config["upstream"].items() if name != "maps"}
    return config | {"upstream": upstream, "data": config["data"] | {"removal": None}}


class _Watch(lightning.Callback):
    """The clocks, and the images shown, after each step."""

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
