"""The training loop, in process: schedules, lengths, and what survives an interruption."""

import copy
import errno
import json
import math
import os
import signal
from collections.abc import Callable
from csv import DictReader
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, distributed, nn
from torch.nn import functional

from gradexp.base.errors import Stopped, UserError
from gradexp.base.files import sha256
from gradexp.data.loader import Batch, TrainingStream
from gradexp.engine import loggers, origin
from gradexp.engine.assemble import make_model
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.fit import Training
from gradexp.engine.hardware import Hardware, native_bf16
from gradexp.engine.run import Config, Paths, Run
from gradexp.tasks import train
from gradexp.terms import Step, Term
from gradexp.training.classifier import Classifier
from gradexp.training.optim import Optim, one_cycle, steps_down

TINY = ["scale=quick", "scale.width=0.04", "data.per_class=4", "optim.passes=5", "trainer.threads=1", "logger=none"]


def run(places: list[str], *words: str) -> Run:
    config = compose_run(["experiment=teacher", *TINY, *words, *places])
    return Run(config, Paths.of(config))


def test_steps_down_is_the_thesis_schedule() -> None:
    """1e-3 until epoch 400 of 500, then 1e-4."""
    factors = [steps_down(epoch / 500, at=[0.8], factor=0.1) for epoch in (0, 399, 400, 499)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


def test_one_cycle_against_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.3, cycle_momentum=False)
    for step in range(100):
        # torch divides by total - 1 and shifts its peak by one step; over 100 steps that is one part in thirty
        assert one_cycle(step / 100, warmup=0.3, start=0.04, end=4e-6) == pytest.approx(reference.get_last_lr()[0], abs=0.06)
        optimizer.step()
        reference.step()
    ends = [one_cycle(progress, warmup=0.3, start=0.04, end=4e-6) for progress in (0, 0.3, 1)]
    assert ends == pytest.approx([0.04, 1, 4e-6])


def optim(**changes: Any) -> Optim:
    return build({**compose_run(["experiment=jacobian_distill", "scale=paper"])["optim"], **changes}, where="optim")


def test_length_is_stated_once() -> None:
    assert optim().total_steps(3) == 1500
    assert optim(passes=None, steps=70).total_steps(3) == 70
    for wrong in ({"steps": 5}, {"passes": None}, {"passes": 0}):
        with pytest.raises(UserError, match="optim"):
            optim(**wrong).total_steps(3)


@pytest.mark.parametrize(
    ("words", "length"),
    [
        (["data.per_class=1"], (None, 4000)),
        (["data.per_class=5"], (None, 4000)),
        (["data.per_class=10"], (None, 4000)),  # 8 batches a pass: as long
        (["data.per_class=50"], (500, None)),  # 20,000 steps
        (["data.per_class=500"], (500, None)),
        (["data.per_class=null"], (500, None)),
        (["data=cifar10", "data.per_class=100"], (None, 4000)),  # the same 1,000 images
        (["data=cifar10", "data.per_class=103"], (500, None)),  # the last batch counts: 9 a pass
        (["data.per_class=10", "optim.batch_size=100"], (500, None)),  # 5,000 steps
        (["data.per_class=50", "scale=paper"], (500, None)),
        (["data.per_class=1", "scale=paper"], (500, None)),
    ],
)
def test_students_train_for_500_passes_or_4000_steps_whichever_is_longer(
    words: list[str], length: tuple[int | None, int | None]
) -> None:
    """Table 2.1 at scale=cpu; the thesis's 500 passes (§2.12.3) at scale=paper."""
    optim = compose_run(["experiment=jacobian_distill", *words])["optim"]
    assert (optim["passes"], optim["steps"]) == length


def test_curves_have_a_point_a_pass_even_when_the_last_is_cut(places: list[str]) -> None:
    record = ensure(run(places, "optim.batch_size=16", "optim.passes=null", "optim.steps=7"))  # 3 steps per pass
    assert record["steps"] == 7
    assert len(record["metrics"]["train/loss"]) == 3


def train_by_hand(student: nn.Module, loss: Callable[[Batch], Tensor], stream: TrainingStream) -> list[float]:
    """Adam, weight decay 0.1 added to the gradient, rate 1e-3 and a tenth of it from half of the steps on. -> all losses."""
    parameters, losses = list(student.train().parameters()), []
    means, squares = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
    for step, batch in enumerate(stream, start=1):
        value, rate = loss(batch), 1e-4 if (step - 1) / stream.steps >= 0.5 else 1e-3
        losses.append(value.item())
        slopes = torch.autograd.grad(value, parameters)
        for parameter, slope, mean, square in zip(parameters, slopes, means, squares, strict=True):
            slope = slope + 0.1 * parameter.detach()
            mean.mul_(0.9).add_(0.1 * slope)
            square.mul_(0.999).add_(0.001 * slope**2)
            parameter.data -= rate * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("method", ["ce", "ce_a_j"])
def test_a_training_is_the_loop_that_is_written_out_here(
    method: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of three passes, of 3, 3 and 1 steps, and the weights at the end; with and without a teacher."""
    words = ["experiment=jacobian_distill", *TINY, f"method={method}", "gradients.backend=autograd", "trainer.precision=32"]
    words += ["optim.batch_size=16", "optim.passes=null", "optim.steps=7", "optim.schedule.at=[0.5]"]
    words += ["optim.optimizer.weight_decay=0.1"]
    if method == "ce_a_j":
        words += ["method.terms.activations.weight=2", "method.terms.jacobian.weight=20"]
        words += ["+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.03"]
    begun, fitted = [], Training.fit

    def fit(training: Training, logger: Any) -> int:
        begun.append((copy.deepcopy(training.module.student), training.loader))
        return fitted(training, logger)

    monkeypatch.setattr(Training, "fit", fit)
    config = compose_run([*words, *places])
    made = Run(config, Paths.of(config))
    record, (student, loader) = ensure(made), begun[-1]  # the teacher was trained first
    teachers = [make_model(below.config).eval() for below in made.upstream.values()]
    for teacher, below in zip(teachers, made.upstream.values(), strict=True):
        teacher.load_state_dict(torch.load(below.weights, weights_only=True))

    def loss(batch: Batch) -> Tensor:
        images = batch.images.detach().requires_grad_()
        logits, total = student(images), torch.zeros(())
        for teacher in teachers:
            both = logits, teacher(images)
            chosen = [values.gather(1, batch.labels[:, None]).sum() for values in both]
            mine, its = (torch.autograd.grad(values, images, create_graph=True)[0] for values in chosen)
            total = 2 * (both[0] - both[1].detach()).square().mean() + 20 * (mine - its).square().sum() / len(images)
        return total + functional.cross_entropy(logits, batch.labels)

    losses = train_by_hand(student, loss, TrainingStream(loader, 7))
    passes = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert record["metrics"]["train/loss"] == pytest.approx(passes, rel=2e-4)
    for name, value in torch.load(made.weights, weights_only=True).items():
        torch.testing.assert_close(
            student.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means are read as on a GPU, and only before checkpoints and at the end."""
    monkeypatch.setattr(Classifier, "_reads_at_once", lambda _: False)
    monkeypatch.setattr("gradexp.training.classifier.READ_EVERY", math.inf)


def told(record: Config) -> Config:
    """What a record has of the training's steps."""
    return {key: record[key] for key in ("metrics", "steps", "status")}


@pytest.mark.parametrize(
    "words", [[], ["optim.batch_size=16", "optim.passes=null", "optim.steps=7"], ["optim.optimizer.lr=1e30", "optim.passes=20"]]
)
@pytest.mark.parametrize("every", [600, 0])
def test_means_that_are_read_late_are_those_that_are_read_at_once(
    words: list[str], every: int, places: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a training that diverges: it goes on until this is noticed, which is not recorded."""
    record = ensure(run([f"{place}/0" for place in places], *words))
    request.getfixturevalue("reads_late")
    steps, step = [], Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", lambda *args: steps.append(1) or step(*args))
    late = ensure(run([f"{place}/1" for place in places], *words, f"trainer.checkpoint_every={every}"))
    assert told(late) == told(record)
    assert len(steps) == (20 if "optim.passes=20" in words and every else record["steps"])


@pytest.mark.parametrize("lr", ["1e-3", "1e30"])
def test_a_training_whose_means_are_read_late_is_interrupted(
    lr: str, places: list[str], reads_late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a checkpoint after step 5, which is after the divergence: the record is the undisturbed one."""
    words = ["optim.passes=9", f"optim.optimizer.lr={lr}"]
    record = ensure(run([f"{place}/0" for place in places], *words))
    step, calls = Classifier.training_step, iter([1] * 5)

    def stopping(*given: Any) -> Any:
        if not next(calls, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    again = run([f"{place}/1" for place in places], *words)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stopping)
        with pytest.raises(Stopped):
            ensure(again)
    state = torch.load(again.checkpoint, weights_only=True)
    assert state["global_step"] == 6 and state["diverged"] == (lr == "1e30")
    assert told(ensure(again)) == told(record)


def test_losing_the_evaluation_loses_no_training(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted after the last step, at any checkpoint: the next attempt ends with the undisturbed numbers."""
    undisturbed = ensure(run([f"{place}/0" for place in places]))
    again = [f"{place}/1" for place in places]

    def interrupt(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gradexp.tasks.train.accuracy_on_test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure(run(again, "trainer.checkpoint_every=0"))
    (checkpoint,) = Path(run(again).folder).glob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    resumed = ensure(run(again))
    assert f"resumes after step 5, from {checkpoint}" in capsys.readouterr().out
    assert resumed["metrics"] == undisturbed["metrics"]
    assert not checkpoint.exists()


def test_a_record_that_can_not_be_written_loses_no_training(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", lambda *args: steps.append(1) or step(*args))
    with monkeypatch.context() as patch:
        patch.setattr("gradexp.engine.ensure.write_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensure(run(places, "trainer.checkpoint_every=0"))
    done = len(steps)
    record = ensure(run(places))
    assert (len(steps), record["steps"]) == (done, done)
    assert not run(places).checkpoint.exists()


def test_a_results_folder_that_can_not_be_written_is_found_before_the_training(places: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    made = run([*places, f"paths.results={tmp_path}/file"])
    with pytest.raises(OSError, match="file"):
        ensure(made)
    assert not made.folder.exists()


def test_after_a_training_that_raised_signals_are_whose_they_were(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the logger raises besides, after which Lightning leaves them as they are."""

    def broken(self: CSVLogger, status: str) -> None:
        raise OSError(status)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Classifier, "training_step", lambda *_: 1 / 0)
    monkeypatch.setattr(CSVLogger, "finalize", broken)
    with pytest.raises((ZeroDivisionError, OSError)):
        ensure(run(places, "logger=csv"))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "moment",
    ["on_fit_start", "on_train_start", "on_train_batch_start", "on_train_end", "on_fit_end"],
)
def test_a_signal_stops_a_training_at_any_moment(moment: str, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = ensure(run(places))
    original = getattr(Classifier, moment, None)

    def signalled(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if original:
            original(*given)

    again = [f"{word}-again" for word in places]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, moment, signalled)
        with pytest.raises(Stopped, match="the same command resumes from the last checkpoint"):
            ensure(run(again))
    assert not run(again).finished
    assert ensure(run(again))["metrics"] == undisturbed["metrics"]


def test_a_record_names_the_code_and_the_precision_of_earlier_attempts(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*places, "optim.batch_size=16", "trainer.checkpoint_every=0"]
    step, steps = Classifier.training_step, iter((1, 1, 0, 1, 0, *[1] * 99))
    monkeypatch.setattr(Classifier, "training_step", lambda *args: step(*args) if next(steps) else 1 / 0)
    for commit in "ab":
        monkeypatch.setattr(origin, "git_state", lambda commit=commit: {"commit": commit, "dirty": commit == "a"})
        with pytest.raises(ZeroDivisionError):
            ensure(run(words))
    record = ensure(run(words))  # by the code of the second attempt
    assert [one["git"] for one in record["attempts"]] == [{"commit": "a", "dirty": True}]
    assert record["attempts"][0]["threads"] == record["threads"]
    assert record["attempts"][0].keys() == {"git", "device", "precision", "threads", "upstream"}


@pytest.mark.parametrize("calls", [2, 4, 7])
def test_a_training_goes_on_in_the_middle_of_a_pass(calls: int, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, views, dropout, schedule, and the sums behind a pass's curve; three steps are a pass."""
    words = ["optim.batch_size=16", "optim.passes=null", "optim.steps=8", "model.dropout=0.3"]
    undisturbed = ensure(run([f"{place}/0" for place in places], *words))
    again = [*(f"{place}/1" for place in places), *words]
    step, seen = Classifier.training_step, []

    def fail(*args: Any) -> Any:
        seen.append(1)
        return step(*args) if len(seen) < calls else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", fail)
        with pytest.raises(ZeroDivisionError):
            ensure(run(again, "trainer.checkpoint_every=0"))
    assert torch.load(run(again).folder / "last.ckpt", weights_only=True)["global_step"] == calls - 1
    resumed = ensure(run(again))
    assert resumed["metrics"] == undisturbed["metrics"]
    weights = [sha256(run([f"{place}/{i}" for place in places], *words).weights) for i in (0, 1)]
    assert weights[0] == weights[1]


def test_the_student_is_put_back_after_training(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning moves it to the CPU at the end; on a GPU, the test images would then be elsewhere."""
    happened: list[tuple[str, Any]] = []
    place, fitted, judged = Hardware.place, lightning.Trainer.fit, train.accuracy_on_test
    monkeypatch.setattr(Hardware, "place", lambda *args: (happened.append(("place", args[1])), place(*args))[1])
    monkeypatch.setattr(
        lightning.Trainer, "fit", lambda *args, **more: (fitted(*args, **more), happened.append(("fit", args[1].student)))[0]
    )
    monkeypatch.setattr(train, "accuracy_on_test", lambda *args: (happened.append(("test", args[0])), judged(*args))[1])
    ensure(run(places))
    assert [what for what, _ in happened[-3:]] == ["fit", "place", "test"]
    assert happened[-3][1] is happened[-2][1] is happened[-1][1]


def test_repeats_are_identical(places: list[str]) -> None:
    records = [ensure(run([f"{place}/{i}" for place in places], "model.dropout=0.3")) for i in range(2)]
    assert records[0]["metrics"] == records[1]["metrics"]


def test_seed_0_is_a_seed(places: list[str]) -> None:
    losses = [ensure(run(places, f"seed={seed}"))["metrics"]["train/loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_layout_and_precision_are_hardware(places: list[str]) -> None:
    plain = ensure(run([f"{place}/0" for place in places], "trainer.channels_last=false", "trainer.precision=32"))
    other = ensure(run([f"{place}/1" for place in places], "trainer.precision=auto"))
    assert plain["id"] == other["id"]
    assert (plain["precision"], other["precision"]) == ("32", "bf16" if native_bf16("cpu") else "32")
    assert other["metrics"]["train/loss"] == pytest.approx(plain["metrics"]["train/loss"], rel=0.1)


def test_emulated_bf16_is_refused(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradexp.engine.hardware.native_bf16", lambda _: False)
    with pytest.raises(UserError, match="use 32 or auto"):
        ensure(run(places, "trainer.precision=bf16", "trainer.accelerator=cpu"))


@pytest.mark.parametrize(
    "word",
    [
        *("trainer.precision=16", "trainer.accelerator=gpu", "trainer.accelerator=gpuu", "trainer.devices=0"),
        *("trainer.devices=-1", "trainer.devices=two", "trainer.devices=[0]"),
    ],
)
def test_impossible_hardware_is_an_error(places: list[str], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=word.split("=")[0]):
        ensure(run(places, word))


def test_the_test_set_is_read_once_at_the_end(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(train, "accuracy_on_test", lambda *_, **__: seen.append(1) or 0.0)
    ensure(run(places))
    assert seen == [1]


def test_csv_logger_keeps_curves_and_the_final_number(places: list[str]) -> None:
    made = run(places, "logger=csv")
    record = ensure(made)
    (file,) = made.folder.rglob("metrics.csv")
    text = file.read_text()
    assert "train/loss/cross_entropy" in text
    assert str(record["metrics"]["test/accuracy"]) in text


def test_a_killed_run_keeps_its_csv_curves_and_goes_on_in_the_next(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["logger=csv", "optim.batch_size=16", "optim.passes=null", "optim.steps=6"]  # two passes of three steps
    step, calls = Classifier.training_step, iter((1, 1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", lambda *args: step(*args) if next(calls, 0) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensure(run(places, *words, "trainer.checkpoint_every=0"))
    made = run(places, *words)
    record = ensure(made)
    first, second = (
        [float(line["train/loss"]) for line in DictReader(file.open()) if line["train/loss"]]
        for file in sorted(made.folder.rglob("metrics.csv"))
    )
    assert first + second == pytest.approx(record["metrics"]["train/loss"], rel=1e-4)  # a record has five digits


def test_a_broken_logger_does_not_break_the_run(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise OSError("no socket")

    monkeypatch.setattr("gradexp.engine.loggers.csv", broken)
    record = ensure(run(places, "logger=csv"))
    assert record["status"] == "finished"
    assert "no socket" in capsys.readouterr().out


def test_a_logger_that_fails_on_the_way_is_said_once(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any) -> None:
        if self.metrics:
            raise OSError("the disk is full")

    monkeypatch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", full)
    record = ensure(run(places, "logger=csv"))
    assert len(record["metrics"]["train/loss"]) == 5
    assert capsys.readouterr().out.count("CSVLogger failed (the disk is full)") == 1


def test_a_logger_that_starts_late_and_fails_does_not_break_the_run(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning's loggers start when they are first used."""

    def broken(*_: Any) -> None:
        raise OSError("no socket")

    monkeypatch.setattr(CSVLogger, "experiment", property(broken))
    record = ensure(run(places, "logger=csv"))
    assert record["status"] == "finished"
    assert "no socket" in capsys.readouterr().out


def test_a_logger_that_fails_when_it_is_closed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(CSVLogger):
        def finalize(self, status: str) -> None:
            raise OSError("no upload")

    loggers.close(Broken(tmp_path), {"test/accuracy": 1.0})
    assert "no upload" in capsys.readouterr().out


def test_both_gradient_backends_train_the_same_model(places: list[str]) -> None:
    words = ["experiment=jacobian_distill", *TINY, "method=ce_a_j", "+upstream.teacher.optim.passes=1"]
    words += ["+upstream.teacher.scale.width=0.03", "trainer.precision=32"]
    made = []
    for backend in ("fast", "autograd"):
        config = compose_run([*words, f"gradients.backend={backend}", *(f"{place}/{backend}" for place in places)])
        made.append(ensure(Run(config, Paths.of(config))))
    assert made[0]["id"] == made[1]["id"]
    # The angle to a teacher of one pass amplifies rounding: images times 1 + 1e-7 move it by 1 %.
    for name, tolerance in (("train/loss/jacobian", 2e-3), ("train/loss/cross_entropy", 2e-3), ("train/angle", 2e-2)):
        assert made[0]["metrics"][name] == pytest.approx(made[1]["metrics"][name], rel=tolerance)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "why", "x"), "error: x can't be written: the disk is full"),
        (RuntimeError("gloo: Connection closed by peer"), "another process of the training ended"),
        (distributed.DistBackendError("NCCL error"), "another process of the training ended"),
        (OSError(errno.EINVAL, "why", "x"), 1),
        (RuntimeError("a mistake of ours"), 1),
    ],
)
def test_an_error_in_one_of_several_processes(
    error: Exception, message: Any, places: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line where the user can mend it or another process tells it; a traceback where the code is wrong."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train, "prepare", fail)
    monkeypatch.setattr(train, "die_with_parent", lambda: None)  # this process goes on
    with pytest.raises(SystemExit) as ended:
        train.train_part(json.dumps(run(places).config))
    assert str(ended.value.code).startswith(str(message))
    assert ("Traceback" in capfd.readouterr().err) == (message == 1)


class Wrong(Term):
    """A term that returns, reads or owns what it may not."""

    def __init__(self, value: Callable[[Step], Any]) -> None:
        super().__init__(weight=1.0)
        self.value = value

    def forward(self, step: Step) -> Any:
        return self.value(step)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda step: step.student_logits.mean(1), r"forward returned a tensor of shape \(\d+,\), expected a scalar"),
        (lambda step: 1.0, "forward returned float, expected a scalar"),
        (lambda step: step.student_input_gradient("label", "batch").mean(), "declares its gradient_target, such as 'label'"),
        (lambda step: step.teacher_logits.mean(), "declares needs_teacher = True"),
    ],
)
def test_a_term_of_ones_own_that_is_wrong_is_named(
    value: Callable[[Step], Any], message: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "make_terms", lambda config: {"own": Wrong(value)})
    with pytest.raises(UserError, match=rf"method\.terms\.own: .*{message}"):
        ensure(run(places))


def test_a_term_with_parameters_is_refused(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    term = Wrong(lambda step: step.student_logits.mean())
    term.scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr(train, "make_terms", lambda config: {"own": term})
    with pytest.raises(UserError, match=r"method\.terms\.own has parameters, which would not be trained"):
        ensure(run(places))
