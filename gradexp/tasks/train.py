"""Train one model, alone or with a teacher, and read the test set once."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, distributed, nn

from gradexp import layers
from gradexp.base.errors import STOPPED, Stopped, UserError, choose
from gradexp.base.files import write_sealed
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Loader, TrainingStream
from gradexp.data.removal import MANIFEST
from gradexp.engine.build import build
from gradexp.engine.callbacks import Checkpointer, ProgressLine
from gradexp.engine.hardware import Hardware
from gradexp.engine.loggers import finish, make_logger
from gradexp.engine.processes import train_together
from gradexp.engine.runs import Config, Paths, Result, Run, digests, git_state
from gradexp.evaluate.accuracy import accuracy
from gradexp.layers import ranks
from gradexp.terms import Term
from gradexp.terms.targets import Map, Targets
from gradexp.training.classifier import Classifier
from gradexp.training.dropout import dropout_after
from gradexp.training.optim import Optim
from gradexp.training.targets import StoredTargets, bytes_each

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Training:
    """What there is before the first step."""

    run: Run
    hardware: Hardware
    data: ImageData
    loader: Loader
    module: Classifier
    checkpointer: Checkpointer
    progress: ProgressLine


def train(run: Run) -> Result:
    """The run's model after its last step; weights in `run.weights`. The checkpoint stays until there is a record."""
    training = prepare(run)
    module, hardware, checkpointer = training.module, training.hardware, training.checkpointer
    together = hardware.together > 1
    # Of the processes the first has one of its own: a CSV file of this one would hold the final number alone.
    logger = None if together and run.config["logger"]["_target_"].endswith("csv") else make_logger(run)
    steps = train_elsewhere(training) if together else run_steps(training, logger)
    if steps < module.total_steps and not module.diverged:
        raise RuntimeError(f"the training ended after {steps} of {module.total_steps} steps; nothing is recorded")
    metrics: dict[str, Any] = module.curves | module.summary()
    metrics["test/accuracy"] = float("nan") if module.diverged else accuracy_on_test(module.student, training.data, hardware)
    if "train/angle" in module.curves:
        metrics["angle"] = module.curves["train/angle"][-1]
    finish(logger, {name: value for name, value in metrics.items() if not isinstance(value, list)})
    save_weights(run, module.student)
    facts = {
        "data": training.data.fingerprint(),
        "parameters": sum(parameter.numel() for parameter in module.student.parameters()),
        "steps": steps,
        "planned_steps": module.total_steps,
        "images_per_second": round(training.progress.images_per_second, 1),
        "earlier_seconds": checkpointer.earlier,
        **({} if module.targets is None else {"targets": module.targets.kind}),
        **({"attempts": checkpointer.attempts} if checkpointer.attempts else {}),
        **hardware.facts(mixed=not module.full_precision),
    }
    if together:
        facts |= {"devices": hardware.together, "threads": hardware.threads_of_each(), **training.progress.memory}
    return Result(metrics, status="diverged" if module.diverged else "finished", facts=facts)


def prepare(run: Run) -> Training:
    """Everything but the training itself, upstream runs included."""
    hardware: Hardware = build(run.config["trainer"], where="trainer")
    hardware.apply()
    data = make_data(run.config, run.paths)
    run.uses(data.fingerprint())
    if data.removal is not None:
        data.removal.open(run.upstream("maps", MANIFEST).folder, data.fingerprint())
    optim: Optim = build(run.config["optim"], where="optim")
    loader = data.train_loader(batch_size=optim.batch_size, device=hardware.device)
    lightning.seed_everything(run.config["seed"], verbose=False)
    terms = make_terms(run.config)
    student = hardware.place(make_student(run, terms, hardware))
    module = make_module(run, student, terms, optim, loader, hardware)
    if hardware.is_part:
        ranks.share_layers(student)
    facts = hardware.facts(mixed=not module.full_precision)
    origin = {"git": git_state(), "device": facts["device"], "precision": facts["precision"], "upstream": digests(run.used)}
    checkpointer = Checkpointer(run.checkpoint, every=hardware.checkpoint_every, origin=origin)
    progress = ProgressLine(f"{run.config['name']} {run.id}", module.total_steps)
    return Training(run, hardware, data, loader, module, checkpointer, progress)


def work(text: str) -> None:
    """What each of the processes of `train_together` does with the run whose config `text` is.

    The last checkpoint of the first holds the outcome. It ends with an honest exit code.
    """
    config = json.loads(text)
    try:
        training = prepare(Run(config, Paths.of(config)))
        run_steps(training, make_logger(training.run) if training.hardware.rank == 0 else None)
    except Stopped:
        sys.exit(STOPPED)  # the process that waits for this one says so
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def train_elsewhere(training: Training) -> int:
    """Has the training done by several processes; the outcome is put into `training`. -> steps done."""
    run, hardware, checkpointer = training.run, training.hardware, training.checkpointer
    if checkpointer.usable():
        checkpointer.load_state_dict(load_checkpoint(checkpointer.path)["callbacks"]["Checkpointer"])
    train_together(run, work, devices=hardware.devices, nodes=hardware.num_nodes)
    state = load_checkpoint(checkpointer.path)
    training.module.load_state_dict(state["state_dict"])
    training.module.on_load_checkpoint(state)
    training.progress.load_outcome(state["callbacks"]["ProgressLine"])
    checkpointer.earlier["cpu"] = state["callbacks"]["Checkpointer"]["cpu"]  # theirs; the wall clock is this process's
    return int(state["global_step"])


def load_checkpoint(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def accuracy_on_test(model: nn.Module, data: ImageData, hardware: Hardware) -> float:
    """Percent of the test images classified correctly."""
    batches = data.test_loader(batch_size=EVALUATION_BATCH, device=hardware.device)
    return accuracy(model, batches, classes=data.classes, device=hardware.device)


def make_data(config: Config, paths: Paths) -> ImageData:
    """The config's data set, checked: its files are there and its classes large enough."""
    data = declare_data(config, paths)
    data.fingerprint()
    return data


def declare_data(config: Config, paths: Paths) -> ImageData:
    """The same before any file is opened: shapes and, for photographs, normalisation are known already."""
    data: ImageData = build(config["data"], where="data", root=paths.data, cache=paths.cache, seed=config["seed"])
    return data


def fast_gradients(config: Config) -> bool:
    """Whether `gradients.backend` is fast; autograd is the reference to compare with."""
    backend = config["gradients"]["backend"]
    return choose("gradients.backend", backend, "fast", "autograd") == "fast"


def make_student(run: Run, terms: dict[str, Term], hardware: Hardware) -> nn.Module:
    """The model before training: new, or with the weights of the upstream run `start` where there is one."""
    student: nn.Module = build(run.config["model"], where="model")
    if "start" in run.config["upstream"]:
        if not Run(run.config["upstream"]["start"], run.paths).weights.exists():  # whether it fits, before it is trained
            with torch.random.fork_rng():
                start: nn.Module = build(run.config["upstream"]["start"]["model"], where="upstream.start.model")
            _take(copy.deepcopy(student), start.state_dict())
        _take(student, torch.load(run.upstream("start").weights, weights_only=True, map_location="cpu"))
    for term in terms.values():
        term.check(student)
    return fast(student, terms, hardware) if fast_gradients(run.config) else student


def _take(student: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises UserError where they are those of another model."""
    try:
        getattr(student, "start_from", student.load_state_dict)(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"the model does not take the weights of upstream.start ({why}); give both one model") from None


def fast(model: nn.Module, terms: dict[str, Term], hardware: Hardware) -> nn.Module:
    """The model with fast layers where they gain something: gradients in its terms, or small maps on a CPU."""
    gains = hardware.kind == "cpu" or any(term.gradient_target for term in terms.values())
    return layers.accelerate(model) if gains else model


def make_terms(config: Config) -> dict[str, Term]:
    """The method's terms, those of weight 0 left out."""
    nodes = {name: node for name, node in config["method"]["terms"].items() if node["weight"] != 0}
    return {name: build(node, where=f"method.terms.{name}") for name, node in nodes.items()}


def make_module(
    run: Run, student: nn.Module, terms: dict[str, Term], optim: Optim, loader: Loader, hardware: Hardware
) -> Classifier:
    """The LightningModule that the method names, its teacher trained first where there is none."""
    method = run.config["method"]
    if not terms:
        raise UserError(f"method={method['name']} has no term of weight other than 0; set one")
    for name, term in terms.items():
        if term.needs_teacher and "teacher" not in run.config["upstream"]:
            raise UserError(
                f"method.terms.{name} needs a teacher, method={method['name']} has none; "
                f"take a method with one, such as method=ce_a_j, and set its weights"
            )
    teacher = None
    if "teacher" in run.config["upstream"]:
        if not Run(run.config["upstream"]["teacher"], run.paths).weights.exists():
            _rehearse(run, student, terms, loader, hardware)
        trained = run.upstream("teacher")
        if (trained.record() or {}).get("status") == "diverged":
            raise UserError(f"the training of the teacher, run {trained.id}, diverged: it teaches nothing; name another one")
        teacher = load_model(trained, hardware)
    for term in terms.values():
        term.place(student, teacher, loader.example)
    extra: dict[str, Any] = {}
    if teacher is not None:
        extra["targets"] = make_targets(run, teacher, terms, loader, optim.total_steps(len(loader)), hardware)
        if method.get("angle"):
            extra["angle"] = method["angle"]
    node = {"_target_": method["module"]}
    common = {"student": student, "terms": terms, "optim": optim, "seed": run.config["seed"]}
    module: Classifier = build(node, where="method.module", steps_per_pass=len(loader), **common, **extra)
    return module


def _rehearse(run: Run, student: nn.Module, terms: dict[str, Term], loader: Loader, hardware: Hardware) -> None:
    """Raises UserError for what terms can't match, by an untrained teacher: before the hours that training one takes."""
    with torch.random.fork_rng():
        teacher = hardware.place(build(run.config["upstream"]["teacher"]["model"], where="upstream.teacher.model")).eval()
    for term in copy.deepcopy(list(terms.values())):
        term.place(student, teacher, loader.example)


def make_targets(
    run: Run, teacher: nn.Module, terms: dict[str, Term], loader: Loader, steps: int, hardware: Hardware
) -> Targets:
    """The teacher's targets: computed once for all views where that pays, otherwise for every batch."""
    helped = [term for term in terms.values() if term.needs_teacher]
    wanted = {term.gradient_target for term in helped if term.gradient_target and term.needs_input_gradient}
    if run.config["method"].get("angle"):
        wanted.add(run.config["method"]["angle"])
    names = list(dict.fromkeys(layer for term in helped for layer in term.teacher_layers))
    with_gradient = bool(wanted) or any(term.gradient_target for term in helped)
    live = Targets(teacher, with_gradient=with_gradient, layers=names)
    if len(wanted) > 1 or "all" in wanted or any(term.teacher_layers and not term.teacher_maps for term in helped):
        return live
    what: dict[str, Any] = {"target": next(iter(wanted), None), "maps": _maps(helped)}
    views = loader.count * loader.views
    fits = views * bytes_each(live, loader, **what) <= hardware.store_gib * 2**30
    pays = steps * loader.batch_size >= 1.5 * views
    if not (fits and pays):
        return live
    facts = [run.used["teacher"], loader.fingerprint, steps, hardware.precision]
    folder = run.paths.cache / "targets" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    with hardware.autocast():
        return StoredTargets(live, loader, steps, folder, **what)


def _maps(terms: Sequence[Term]) -> list[Map]:
    return list(dict.fromkeys(wanted for term in terms for wanted in term.teacher_maps))


def load_model(run: Run, hardware: Hardware) -> nn.Module:
    """A trained run's model, in eval mode and frozen: whoever differentiates it pays for no gradient of its parameters."""
    model: nn.Module = build(run.config["model"], where="model")
    model.load_state_dict(torch.load(run.weights, weights_only=True, map_location="cpu"))
    model = hardware.place(model).eval().requires_grad_(False)
    return fast(model, {}, hardware) if fast_gradients(run.config) else model


def save_weights(run: Run, model: nn.Module) -> None:
    content = io.BytesIO()  # a file's name would be part of what torch writes, and of its digest
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    write_sealed(run.weights, lambda draft: draft.write_bytes(content.getvalue()))


def run_steps(training: Training, logger: Any) -> int:
    """This process's part of the training, from the last checkpoint where there is one. -> steps done."""
    hardware, module = training.hardware, training.module
    world = hardware.together if hardware.is_part else 1
    stream = TrainingStream(training.loader, module.total_steps, rank=hardware.rank, world=world)
    with dropout_after(training.module.student, training.run.config["method"].get("dropout"), training.loader.example):
        fit(module, stream, hardware, logger, training.checkpointer, training.progress)
    return int(module.global_step)


def fit(
    module: Classifier,
    stream: TrainingStream,
    hardware: Hardware,
    logger: Any,
    checkpointer: Checkpointer,
    progress: ProgressLine,
    *watching: lightning.Callback,
) -> None:
    """Runs the training to its end, from the last checkpoint where there is one."""
    with warnings.catch_warnings():
        # Lightning warns of loaders without workers and of a log interval; neither exists here.
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=1,
            logger=logger or False,
            callbacks=[checkpointer, progress, *watching],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        resume = checkpointer.path if checkpointer.usable() else None
        trainer.fit(module, stream, ckpt_path=resume, weights_only=True)
    hardware.place(module.student)  # Lightning leaves it on the CPU
