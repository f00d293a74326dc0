"""Train one model, alone or with a teacher, and read the test set once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import nn

from gradexp import gradients, layers
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Loader, TrainingStream
from gradexp.data.removal import MANIFEST
from gradexp.errors import UserError
from gradexp.evaluate.accuracy import accuracy
from gradexp.runs import Config, Paths, Result, Run, write_atomically
from gradexp.tasks.build import build
from gradexp.tasks.hardware import Hardware
from gradexp.tasks.loggers import finish, make_logger
from gradexp.terms import Term
from gradexp.terms.step import Map, Targets
from gradexp.training.callbacks import Checkpointer, ProgressLine
from gradexp.training.classifier import Classifier
from gradexp.training.dropout import dropout_after
from gradexp.training.optim import Optim
from gradexp.training.targets import LiveTargets, StoredTargets, bytes_each

EVALUATION_BATCH = 512


def train(run: Run) -> Result:
    """The run's model after its last step; weights in `run.weights`."""
    hardware: Hardware = build(run.config["trainer"], where="trainer")
    hardware.apply()
    data = make_data(run.config, run.paths)
    if data.removal is not None:
        data.removal.open(run.upstream("maps", MANIFEST).folder, data.fingerprint())
    optim: Optim = build(run.config["optim"], where="optim")
    loader = data.train_loader(batch_size=optim.batch_size, device=hardware.device)
    lightning.seed_everything(run.config["seed"], verbose=False)
    terms = make_terms(run.config)
    student = hardware.place(make_student(run, terms))
    module = make_module(run, student, terms, optim, loader, hardware)

    stream = TrainingStream(loader, module.total_steps)
    checkpointer = Checkpointer(run.folder / "last.ckpt", every=hardware.checkpoint_every)
    progress = ProgressLine(f"{run.config['name']} {run.id}", module.total_steps)
    logger = make_logger(run)
    with dropout_after(student, run.config["method"].get("dropout"), loader.example):
        fit(module, stream, hardware, logger, checkpointer, progress)

    metrics: dict[str, Any] = module.curves | module.summary() | judge(module, data, hardware)
    if "train/angle" in module.curves:
        metrics["angle"] = module.curves["train/angle"][-1]
    finish(logger, {name: value for name, value in metrics.items() if not isinstance(value, list)})
    save_weights(run, student)
    checkpointer.path.unlink(missing_ok=True)
    facts = {
        "data": data.fingerprint(),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "steps": module.global_step,
        "images_per_second": round(progress.images_per_second, 1),
        "earlier_seconds": checkpointer.earlier,
        **hardware.facts(),
    }
    return Result(metrics, status="diverged" if module.diverged else "finished", facts=facts)


def judge(module: Classifier, data: ImageData, hardware: Hardware) -> dict[str, float]:
    """The test accuracy of the trained student; NaN where training diverged."""
    if module.diverged:
        return {"test/accuracy": float("nan")}
    batches = data.test_loader(batch_size=EVALUATION_BATCH, device=hardware.device)
    return {"test/accuracy": accuracy(module.student, batches, classes=data.classes, device=hardware.device)}


def make_data(config: Config, paths: Paths) -> ImageData:
    """The config's data set, checked: its files are there and its classes large enough."""
    data: ImageData = build(config["data"], where="data", root=paths.data, cache=paths.cache, seed=config["seed"])
    data.fingerprint()
    return data


def fast_gradients(config: Config) -> bool:
    """Whether `gradients.backend` is fast; autograd is the reference to compare with."""
    backend = config["gradients"]["backend"]
    if backend not in ("fast", "autograd"):
        raise UserError(f"gradients.backend={backend}: it is fast or autograd")
    return bool(backend == "fast")


def make_student(run: Run, terms: dict[str, Term]) -> nn.Module:
    """The model before training: new, or with the weights of the upstream run `start` where there is one."""
    student: nn.Module = build(run.config["model"], where="model")
    if "start" in run.config["upstream"]:
        weights = torch.load(run.upstream("start").weights, weights_only=True, map_location="cpu")
        getattr(student, "start_from", student.load_state_dict)(weights)
    for term in terms.values():
        term.check(student)
    if any(term.third_derivatives for term in terms.values()):
        return gradients.allow_third_derivatives(student)
    wanted = any(term.gradient_target for term in terms.values())
    return layers.accelerate(student) if wanted and fast_gradients(run.config) else student


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
    teacher = load_model(run.upstream("teacher"), hardware) if "teacher" in run.config["upstream"] else None
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
    live = LiveTargets(teacher, with_gradient=with_gradient, layers=names)
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
    """A trained run's model, in eval mode."""
    model = build(run.config["model"], where=f"the model of {run.id}")
    model.load_state_dict(torch.load(run.weights, weights_only=True, map_location="cpu"))
    return hardware.place(model).eval()


def save_weights(run: Run, model: nn.Module) -> None:
    content = io.BytesIO()
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    write_atomically(run.weights, content.getvalue())


def fit(
    module: Classifier,
    stream: TrainingStream,
    hardware: Hardware,
    logger: Any,
    checkpointer: Checkpointer,
    progress: ProgressLine,
) -> None:
    """Runs the training to its end, from the last checkpoint where there is one."""
    with warnings.catch_warnings():
        # Lightning warns of loaders without workers and of a log interval; neither exists here.
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=1,
            logger=logger or False,
            callbacks=[checkpointer, progress],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        resume = checkpointer.path if checkpointer.path.exists() else None
        trainer.fit(module, stream, ckpt_path=resume, weights_only=True)
