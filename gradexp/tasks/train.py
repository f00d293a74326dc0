"""Train one model, alone or with a teacher, and test it once."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import distributed, nn

from gradexp.base.errors import Stopped, UserError, choose, nearest
from gradexp.data.loader import Loader, TrainingStream
from gradexp.engine import assemble
from gradexp.engine.assemble import make_data, make_hardware, make_model, make_optim, make_terms
from gradexp.engine.build import build
from gradexp.engine.ensure import finish
from gradexp.engine.exits import die_of_interrupt, die_with_parent, fix_of, is_out_of_memory
from gradexp.engine.hardware import Hardware
from gradexp.engine.loggers import close, make_logger
from gradexp.engine.origin import attempt, git_state
from gradexp.engine.record import judged
from gradexp.engine.run import Config, Paths, Run
from gradexp.engine.task import Finished, Result, Sizes, Task, Upstream, digests_of, images_of
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.gradients import TARGETS, checked_logits
from gradexp.layers import ranks
from gradexp.terms import Term
from gradexp.training.dropout import dropout_after
from gradexp.training.optim import Optim
from gradexp.training.targets import make_targets

READ = ("teacher", "start", "maps")  # the upstream runs of a training

# The engine of trainings is imported by the functions that train: make plan needs the class, and Lightning takes seconds.
if TYPE_CHECKING:
    from gradexp.engine.fit import Training
    from gradexp.training.classifier import Classifier


class Train(Task):
    """Trains the run's model; its weights after the last step are the product, `weights.pt`.

    Metrics: `test/accuracy`, percent, NaN where the training diverged; the curves of training.classifier; `angle`, degrees, the
    last value of `train/angle`; what the method's module adds.
    """

    product: ClassVar[str] = "weights.pt"

    def check(self, run: Run) -> None:
        """Builds data, terms, student and teacher with untrained weights, so that settings that do not fit raise now."""
        for name in run.upstream.keys() - set(READ):
            raise UserError(f"upstream.{name}: a training reads {', '.join(READ)}{nearest(name, READ)}")
        hardware, data, terms = make_hardware(run.config), make_data(run), make_terms(run.config)
        _check_teacher(run, terms)
        data.removal = None  # its maps may not be computed yet
        loader = data.train_loader(batch_size=make_optim(run.config).batch_size, device=hardware.device)
        student, teacher = hardware.place(make_model(run.config)), None
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError(f"model: {type(student).__name__} has no parameters to train")
        _check_shape(student, loader, data.classes)
        TrainingStream(loader, 1, world=hardware.together)  # raises where the devices can't share a batch
        with dropout_after(student, run.config["method"].get("dropout"), loader.example):
            pass  # raises for a layer that the model does not have
        if "start" in run.upstream:
            assemble.start_from(student, make_model(run.upstream["start"].config, "upstream.start.model").state_dict())
        if "teacher" in run.upstream:
            teacher = hardware.place(make_model(run.upstream["teacher"].config, "upstream.teacher.model")).eval()
        for name, term in terms.items():
            if next(term.parameters(), None) is not None:
                raise UserError(f"method.terms.{name} has parameters, which would not be trained; put them into the model")
            term.check(student)
            term.resolve_layers(student, teacher, loader.example)

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        training = prepare(run, upstream)
        module, hardware = training.module, training.hardware
        together = hardware.together > 1
        logger = None if together else make_logger(run)
        steps = training.fit_in_processes(train_part) if together else training.fit(logger)
        if together and not run.config["logger"]["_target_"].endswith("csv"):  # whose file would only hold the final metrics
            logger = make_logger(run)  # after the first process closed its own: W&B refuses a run that is open elsewhere
        if steps < module.total_steps and not module.diverged:
            raise RuntimeError(f"the training ended after {steps} of {module.total_steps} steps; nothing is recorded")
        metrics: dict[str, Any] = module.curves | module.summary()
        accuracy = float("nan") if module.diverged else accuracy_on_test(module.student, training.data, hardware.device)
        metrics["test/accuracy"] = accuracy
        if "train/angle" in module.curves:
            metrics["angle"] = module.curves["train/angle"][-1]
        facts = facts_of(training, steps)
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        close(logger, judged(numbers, run.config), {**facts, "git": git_state()})
        assemble.save_weights(run, module.student)
        return Result(metrics, "diverged" if math.isnan(accuracy) else "finished", facts)

    def work(self, config: Config, sizes: Sizes) -> float | None:
        optim, train = config["optim"], images_of(config, sizes)[0]
        if optim["steps"] is not None:
            return float(optim["steps"] * min(optim["batch_size"], train or optim["batch_size"]))
        return None if train is None else float(optim["passes"] * train)


def _check_shape(student: nn.Module, loader: Loader, classes: int) -> None:
    """Raises UserError for a network that does not take the images, or does not give one logit for each class."""
    shape = " x ".join(map(str, loader.example.shape[1:]))
    try:
        with torch.no_grad():
            logits = checked_logits(student.eval()(loader.example))
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"model: it does not take images of {shape} ({str(error).splitlines()[0]})") from None
    if tuple(logits.shape) != (1, classes):
        raise UserError(
            f"model: of an image of {shape} it gives {tuple(logits.shape)}, expected (1, {classes}): data.classes logits"
        )
    student.train()


def prepare(run: Run, upstream: Upstream) -> Training:
    """Everything that a training needs: data, seeded networks, terms, targets, checkpointer."""
    from lightning import seed_everything

    from gradexp.engine.callbacks import Checkpointer, ProgressLine
    from gradexp.engine.fit import Training

    config, hardware, data = run.config, make_hardware(run.config), make_data(run)
    if data.removal is not None:
        data.removal.open(upstream["maps"].run.folder, data.fingerprint())
    optim = make_optim(run.config)
    loader = data.train_loader(batch_size=optim.batch_size, device=hardware.device)
    seed_everything(config["seed"], verbose=False)
    terms = make_terms(config)
    student = make_student(run, upstream, terms, hardware)
    module = make_module(run, upstream, student, terms, optim, loader, hardware)
    if hardware.is_part:
        ranks.share_layers(student)
    origin = attempt(hardware.facts(mixed=not module.full_precision), digests_of(upstream))
    checkpointer = Checkpointer(run.checkpoint, every=hardware.checkpoint_every, run=run.id, origin=origin)
    progress = ProgressLine(f"{run.name} {run.id}", module.total_steps)
    return Training(run, hardware, data, loader, module, checkpointer, progress)


def make_student(run: Run, upstream: Upstream, terms: dict[str, Term], hardware: Hardware) -> nn.Module:
    """The model before training: random, or with the weights of the upstream run `start` if it has one."""
    student = make_model(run.config)
    if "start" in upstream:
        assemble.start_from(student, assemble.load_weights(upstream["start"]))
    if run.config["gradients"]["backend"] == "fast":
        student = assemble.accelerate(student, terms, hardware)
    return hardware.place(student)


def make_module(
    run: Run,
    upstream: Upstream,
    student: nn.Module,
    terms: dict[str, Term],
    optim: Optim,
    loader: Loader,
    hardware: Hardware,
) -> Classifier:
    """The LightningModule that the method names."""
    teacher = _load_teacher(upstream["teacher"], hardware) if "teacher" in upstream else None
    for term in terms.values():
        term.resolve_layers(student, teacher, loader.example)
    common = {"student": student, "terms": terms, "optim": optim, "seed": run.config["seed"], "steps_per_pass": len(loader)}
    options: dict[str, Any] = {}
    if teacher is not None:
        angle, trained = run.config["method"].get("angle"), upstream["teacher"]
        options = {"angle": angle} if angle else {}
        options["targets"] = make_targets(
            teacher,
            list(terms.values()),
            loader,
            optim.total_steps(len(loader)),
            angle=angle,
            store_gib=hardware.store_gib,
            autocast=hardware.autocast(),
            cache=run.paths.cache / "targets",
            origin=[trained.run.id, trained.digest, hardware.precision],
        )
    return build({"_target_": run.config["method"]["module"]}, where="method.module", **common, **options)


def _load_teacher(trained: Finished, hardware: Hardware) -> nn.Module:
    if trained.record["status"] == "diverged":
        raise UserError(f"the teacher, run {trained.run.id}, diverged in training: take another one, such as another seed")
    return assemble.load_model(trained, hardware)


def _check_teacher(run: Run, terms: dict[str, Term]) -> None:
    """Raises UserError for a method without terms, and for a term whose teacher is missing."""
    method, angle = run.config["method"]["name"], run.config["method"].get("angle")
    if angle is not None:
        choose("method.angle", angle, *TARGETS)
        if "teacher" not in run.upstream:
            raise UserError(f"method.angle={angle} is an angle with a teacher's gradients, and method={method} has no teacher")
    if not terms:
        raise UserError(f"method={method}: every term has weight 0; set a weight, such as method.terms.cross_entropy.weight=1")
    for name, term in terms.items():
        if term.needs_teacher and "teacher" not in run.upstream:
            raise UserError(
                f"method.terms.{name} needs a teacher, and method={method} has none: "
                "take a method with a teacher, such as method=ce_a_j, and set its weights"
            )


def facts_of(training: Training, steps: int) -> dict[str, Any]:
    """The facts of a training for its record."""
    module, hardware, checkpointer = training.module, training.hardware, training.checkpointer
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
    if hardware.together > 1:
        facts |= {"devices": hardware.together, "threads": hardware.threads_of_each(), **training.progress.memory}
    return facts


def train_part(text: str) -> None:
    """Runs in each of several processes: its part of the training of the run whose config is `text`, in JSON.

    The result is the last checkpoint of the first process. The exit code is not zero after an error.
    """
    die_with_parent()
    config, logger = json.loads(text), None
    try:
        run = Run(config, Paths.of(config))
        training = prepare(run, {name: finish(below) for name, below in run.upstream.items()})
        logger = make_logger(run) if training.hardware.rank == 0 else None
        training.fit(logger)
        close(logger, {})
    except Stopped as error:
        close(logger, {})
        from gradexp.engine.fit import EXITED

        os._exit(EXITED + error.number)  # at once: SLURM kills soon. The waiting process prints the message
    except KeyboardInterrupt:
        die_of_interrupt()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if (fix := fix_of(error)) is None:
            traceback.print_exc()
        sys.exit(f"error: {fix}" if fix else 1)
    except Exception as error:
        if isinstance(error, distributed.DistError) or "Connection closed by peer" in str(error):
            sys.exit("another process of the training ended; its message tells why")
        traceback.print_exc()
        sys.exit(1)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
