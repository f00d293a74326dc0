"""Two processes compute what one does: gradients, samples, records."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gradexp import layers
from gradexp.base.errors import Stopped, UserError
from gradexp.data.loader import Batch, TensorLoader, TrainingStream
from gradexp.data.sources import Split
from gradexp.engine.assemble import make_terms
from gradexp.engine.build import build
from gradexp.engine.callbacks import Checkpointer
from gradexp.engine.compose import CONF, compose_run, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.fit import Training
from gradexp.engine.run import ROOT, Paths, Run
from gradexp.layers import ranks
from gradexp.training.classifier import Classifier
from gradexp.training.dropout import dropout_after
from gradexp.training.targets import make_targets

WORLD, COUNT, SIZE = 2, 7, 16

# The experiment that a file of conf/method is made for, by the file that it starts from.
EXPERIMENTS = {
    "_distillation": ["experiment=jacobian_distill"],
    "_full_gradient": ["experiment=fullgrad_distill", "model=vgg4"],
    "_transfer": ["experiment=jacobian_transfer"],
    "_regularised": ["experiment=bias_gradient", "model=vgg4"],
    "score_matching": ["experiment=score_matching"],
    "fooling": ["experiment=fooling"],
    "": ["experiment=teacher", "model=vgg4"],
}


def experiment_of(method: Path) -> list[str]:
    text = f"{method.stem} {method.read_text()}"
    return next(words for name, words in EXPERIMENTS.items() if name in text)


METHODS = {file.stem: [*experiment_of(file), f"method={file.stem}"] for file in sorted((CONF / "method").glob("[!_]*.yaml"))}
METHODS |= {
    "ce_a_j, running statistics": ["experiment=jacobian_distill", "method.terms.jacobian.student_bn=running"],
    "full Jacobian": ["experiment=jacobian_distill", "method=a_j", "method.terms.jacobian.target=all"],
    "gradient_norm, dropout": ["experiment=teacher", "model=vgg4", "method=gradient_norm", "model.dropout=0.25"],
    "effective bias": ["experiment=bias_gradient", "model=vgg4", "method.terms.bias_gradient.bias=effective"],
    "hutchinson": ["experiment=score_matching", "method.terms.score_matching.estimator=hutchinson"],
    "fg_att, stored targets": METHODS["fg_att"],
}


def loader(classes: int = 10, size: int = SIZE) -> TensorLoader:
    """Images are in float64, as the statistics are."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (COUNT, 3, size, size), generator=generator, dtype=torch.uint8).numpy()
    half = torch.full((3,), 0.5, dtype=torch.float64)
    split = Split(images, (torch.arange(COUNT) % classes).numpy())
    return TensorLoader(split, range(COUNT), batch_size=COUNT, mean=half, std=half, shuffle=True, flip=True, crop=2, seed=3)


def size_of(words: list[str]) -> int:
    """Of the images: VGG-9 halves them five times."""
    return 2 * SIZE if "experiment=jacobian_transfer" in words else SIZE


def classifier(words: list[str], folder: Path | None) -> tuple[Classifier, TensorLoader, dict[str, Any] | None]:
    """The method's module, with a random student and teacher in float64, their batch statistics far from the stored ones.

    folder: where the teacher's targets are stored, None for live ones.
    """
    config = compose_run([*words, "scale=quick", "scale.width=0.04", "data.channels=3"])
    torch.manual_seed(7)
    upstream = config["upstream"].get("teacher", {}) if "Transfer" in config["method"]["module"] else {}
    models = (config["model"], upstream.get("model", config["model"]))
    student, teacher = (
        build(model | ({"size": SIZE} if model.get("size") else {}), where="model").double() for model in models
    )
    for module in [*student.modules(), *teacher.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    classes = min(10, *(head.out_features for head in student.modules() if isinstance(head, nn.Linear)))
    terms, images = make_terms(config), loader(classes, size_of(words))
    for term in terms.values():
        term.resolve_layers(student, teacher if term.needs_teacher else None, images.example.double())
    layers.accelerate(student)
    options: dict[str, Any] = {"optim": build(config["optim"], where="optim"), "steps_per_pass": 2, "seed": 0}
    if "teacher" in config["upstream"]:
        angle, steps = config["method"].get("angle"), 2 * images.views  # so many that storing pays
        stored: dict[str, Any] = {"store_gib": 1 if folder else 0, "cache": folder, "autocast": nullcontext(), "origin": []}
        options |= {"angle": angle} if angle else {}
        options["targets"] = make_targets(teacher, list(terms.values()), images, steps, angle=angle, **stored)
        assert options["targets"].kind == ("stored" if folder else "live")
    module = build({"_target_": config["method"]["module"]}, where="module", student=student, terms=terms, **options)
    return module.train(), images, config["method"].get("dropout")


class Stepping(nn.Module):
    """What Lightning wraps: a forward that is the training step."""

    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        self.module.on_train_batch_start(batch, 0)
        return self.module.training_step(batch, 0)


def gradients(words: list[str], folder: Path | None, rank: int, world: int) -> dict[str, Tensor]:
    """Parameter gradients, batch statistics and curves of one step on this process's part of the batch."""
    module, images, where = classifier(words, folder)
    batch = next(images.batches(0, rank=rank, world=world))
    stepping: nn.Module = Stepping(module)
    if world > 1:
        ranks.share_layers(module.student)
        stepping = DistributedDataParallel(stepping, find_unused_parameters=True, broadcast_buffers=False)
    with dropout_after(module.student, where, torch.zeros_like(batch.images[:1])):
        stepping(batch).backward()
    found = {name: value.grad for name, value in module.student.named_parameters() if value.grad is not None}
    found |= {name: value.double() for name, value in module.student.named_buffers()}
    return found | {name: value.double() for name, value in module._totals().items()}


def _rank(rank: int, place: str, work: Callable[[int], Any], results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=WORLD)
    results.put((rank, work(rank)))
    distributed.barrier()
    distributed.destroy_process_group()


def in_two_processes(place: Path, work: Callable[[int], Any]) -> list[Any]:
    """[what rank 0 found, what rank 1 found]."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, str(place), work, results), daemon=True) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    found = dict[int, Any]()
    while len(found) < WORLD:
        if not results.empty():
            found |= dict([results.get()])
        assert not any(worker.exitcode for worker in workers), "a process failed; its traceback is in what it printed"
        time.sleep(0.01)
    for worker in workers:
        worker.join(20)
    return [found[rank] for rank in range(WORLD)]


def test_gradients_of_every_method_are_those_of_one_process(tmp_path: Path) -> None:
    """And so are curves. In float64, on a batch that two processes can't halve: 7 images, 4 and 3."""

    def of_all(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
        folder = tmp_path / f"targets of {world}"
        return {name: gradients(words, folder if "stored" in name else None, rank, world) for name, words in METHODS.items()}

    def work(rank: int) -> dict[str, dict[str, Any]]:
        return {name: {key: value.numpy() for key, value in found.items()} for name, found in of_all(rank, WORLD).items()}

    single = of_all(0, 1)
    assert {name for name in single if "train/angle" in single[name]} >= {"ce_a_j", "ce_a_10", "fg_att, stored targets"}

    for found in in_two_processes(tmp_path / "meet", work):
        for method, expected in single.items():
            assert found[method].keys() == expected.keys(), method
            for name, value in expected.items():
                tolerance = 1e-6 if name.startswith("train/") else 1e-12  # curves are kept in float32
                distance = (torch.as_tensor(found[method][name]) - value).norm()
                assert distance <= tolerance * (1 + value.norm()), f"{method}: {name}"


def test_seconds_of_all_processes_are_counted(tmp_path: Path) -> None:
    """What a checkpoint says that the first of them, who writes the record, could not know."""

    def work(rank: int) -> tuple[float, float]:
        with pytest.MonkeyPatch.context() as patch:
            spent = iter([{"wall": 0.0, "cpu": 0.0}, {"wall": 10.0, "cpu": 3.0 + rank}])
            patch.setattr("gradexp.engine.clocks.read", lambda: next(spent))
            checkpointer = Checkpointer(tmp_path / "last.ckpt", every=60)
            checkpointer.earlier = {"wall": 100.0, "cpu": 20.0}
            state = checkpointer.state_dict()
        return state["wall"], state["cpu"]

    assert in_two_processes(tmp_path / "meet", work) == [(110.0, 27.0)] * 2


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch_of_the_same_sequence(world: int) -> None:
    """Resumed by another number of processes after three steps, the sequence of images and views is the same."""

    def shown(stream: TrainingStream) -> list[Tensor]:
        return [torch.stack([batch.row, batch.view]) for batch in stream]

    def streams(world: int) -> list[TrainingStream]:
        return [TrainingStream(loader(), 5, rank=rank, world=world) for rank in range(world)]

    (whole,) = map(shown, streams(1))
    parts = list(zip(*map(shown, streams(world)), strict=True))
    assert all(torch.equal(torch.cat(part, dim=1), batch) for part, batch in zip(parts, whole, strict=True))
    resumed = streams(world)
    for stream in resumed:
        stream.load_state_dict({"step": 3})
    parts = list(zip(*map(shown, resumed), strict=True))
    assert len(parts) == 2
    assert all(torch.equal(torch.cat(part, dim=1), batch) for part, batch in zip(parts, whole[3:], strict=True))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm1d(3), nn.Dropout2d()]
)
def test_layers_that_would_see_the_images_of_one_process_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"layer 0, {type(layer).__name__}, can't share a batch"):
        ranks.share_layers(nn.Sequential(layer))


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="fewer devices"):
        TrainingStream(loader(), 5, rank=0, world=COUNT + 1)


def test_one_process_begins_and_two_finish(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three of five steps and resumed by trainer=ddp: the id, the one record and the numbers of one process.

    Numbers agree as well as torch's batch normalisation computes: on the CPU it sums channels-last images naively.
    """
    words = ["experiment=teacher", "model=vgg4", "scale=quick", "scale.width=0.1", "data.per_class=4", "optim.batch_size=17"]
    words += ["optim.passes=null", "optim.steps=5", "logger=none", "trainer.precision=32", "trainer.threads=1"]

    def run(place: str, *more: str) -> Run:
        config = compose_run([*words, *more, *(f"{folder}/{place}" for folder in places)])
        return Run(config, Paths.of(config))

    whole = ensure(run("whole"))
    with monkeypatch.context() as patch:
        steps = iter([False, False, True])
        patch.setattr(Checkpointer, "on_train_batch_end", lambda self, trainer, *_: next(steps) and stop(self, trainer))
        with pytest.raises(Stopped):
            ensure(run("shared"))
    monkeypatch.setattr("gradexp.engine.hardware.cpu_count", lambda: 6)
    shared = ensure(run("shared", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=null"))
    assert (shared["id"], shared["steps"], shared["devices"]) == (whole["id"], 5, 2)
    assert shared["threads"] == 3  # of each
    assert [path.stem for path in run("shared").paths.results.rglob("*.json")] == [whole["id"]]
    assert shared["metrics"]["train/loss"] == pytest.approx(whole["metrics"]["train/loss"], rel=1e-2)
    assert shared["metrics"]["test/accuracy"] == pytest.approx(whole["metrics"]["test/accuracy"], abs=5)


def stop(checkpointer: Checkpointer, trainer: Any) -> None:
    checkpointer.save(trainer)
    raise Stopped


def test_many_runs_with_many_devices_each_are_refused(run_py: Callable[..., Any]) -> None:
    done = run_py("-m", "experiment=teacher", "scale=quick", "seed=0,1", "trainer.devices=2", "logger=none")
    assert done.returncode != 0
    assert "one run at a time" in done.stderr
    assert "Traceback" not in done.stderr


def children(pid: int) -> list[int]:
    """Its child processes, the oldest first."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().partition("PPid:")[2].split()[0])
    return sorted(child for child, parent in parents.items() if parent == pid)


def training_processes(pid: int) -> list[int]:
    """The processes that a run by several processes has started, in the order of their ranks."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes through /proc")
def test_a_signal_to_any_process_stops_all_with_a_checkpoint(places: list[str], tmp_path: Path) -> None:
    """No record is written for what was trained by then; the next attempt, by one process, does the rest of the steps."""
    words = ["experiment=teacher", "scale=quick", "scale.width=0.04", "optim.passes=12", "logger=none", "trainer=ddp"]
    words += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1", "trainer.checkpoint_every=0", *places]
    for rank in (1, 0):
        command = [sys.executable, "run.py", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (checkpoint,) = wait_for(lambda: list(tmp_path.rglob("last.ckpt")))
        before = checkpoint.stat().st_mtime_ns
        wait_for(lambda checkpoint=checkpoint, before=before: checkpoint.stat().st_mtime_ns != before)
        os.kill(training_processes(process.pid)[rank], signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 143, output
        assert "stopped by SIGTERM; the same command resumes from the last checkpoint" in output
        assert not list((tmp_path / "results").rglob("*.json"))
    record = ensure(plan([word for word in words if word != "trainer=ddp"] + ["trainer.devices=1"]))
    assert record["steps"] == record["planned_steps"]


def wait_for(found: Callable[[], Any]) -> Any:
    for _ in range(1200):
        if value := found():
            return value
        time.sleep(0.1)
    raise TimeoutError


def test_a_training_that_ended_early_is_not_recorded(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=teacher", "scale=quick", "scale.width=0.04", "optim.passes=2", "logger=none", *places]
    config = compose_run(words)
    whole = Training.fit
    monkeypatch.setattr(Training, "fit", lambda *given: whole(*given) - 1)
    with pytest.raises(RuntimeError, match=r"ended after \d+ of \d+ steps"):
        ensure(Run(config, Paths.of(config)))
    assert not Run(config, Paths.of(config)).finished


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes through /proc")
def test_no_training_process_outlives_a_command_that_was_killed(places: list[str], tmp_path: Path) -> None:
    """It would wait for the command's store for half an hour, and hold its GPU."""
    words = ["experiment=teacher", "scale=quick", "scale.width=0.04", "optim.passes=999", "logger=none", "trainer=ddp"]
    words += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1", "trainer.checkpoint_every=0", *places]
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.rglob("last.ckpt")))
    started = training_processes(process.pid)
    assert len(started) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{number}/cmdline").exists() for number in started))
