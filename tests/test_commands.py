"""The commands that users type, in processes of their own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from commands import run_python

from gradexp.base.errors import UserError
from gradexp.engine import compose, help, plugins
from gradexp.engine import ensure as ensuring
from gradexp.engine.build import locate
from gradexp.engine.command_line import check_overrides
from gradexp.engine.compose import CONF, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.known import answer
from gradexp.engine.launchers import run_all
from gradexp.engine.run import ROOT
from gradexp.models.vgg import VGG

sys.path.insert(0, str(ROOT / "scripts"))

import common

RunPy = Callable[..., "subprocess.CompletedProcess[str]"]

# Seconds instead of minutes: narrow networks, few passes, a teacher to match.
TINY = ["scale=quick", "scale.width=0.04", "optim.passes=2", "trainer.threads=1", "logger=none"]
TEACHER = ["+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.03"]
DISTILL = ["experiment=jacobian_distill", *TINY, *TEACHER]


def records(tmp_path: Path, experiment: str) -> dict[str, dict[str, Any]]:
    files = (tmp_path / "results" / "runs" / experiment).glob("*.json")
    return {file.stem: json.loads(file.read_text()) for file in files}


def test_a_run_trains_once_and_then_answers_from_its_record(tmp_path: Path, run_py: RunPy) -> None:
    done = run_py(*DISTILL, "method=ce_a_j", "data.per_class=1")
    assert done.returncode == 0, done.stderr
    ((run, record),) = records(tmp_path, "jacobian_distill").items()
    accuracy, made = record["metrics"]["test/accuracy"], f"precision {record['precision']}, {record['ended'][:10]}"
    assert done.stdout.splitlines()[-1] == f"run {run} finished: test/accuracy={accuracy:.2f} ({made})"
    (teacher,) = records(tmp_path, "teacher")
    assert record["upstream"]["teacher"]["id"] == teacher
    assert record["status"] == "finished"
    assert len(record["metrics"]["train/loss/jacobian"]) == len(record["metrics"]["train/angle"]) == 2
    wanted = {"config", "data", "device", "ended", "git", "images_per_second", "parameters", "peak_memory_mib"}
    assert wanted | {"precision", "scale", "seconds", "seed", "started", "threads", "upstream", "versions"} <= record.keys()
    words = record["command"].split()[2:]
    assert plan(words).id == run
    assert not any(word.startswith(("paths.", "trainer.", "logger")) for word in words)

    (weights,) = tmp_path.rglob("jacobian_distill/*/weights.pt")
    weights.unlink()  # the record alone is enough
    begun = time.monotonic()
    again = run_py(*DISTILL, "method=ce_a_j", "data.per_class=1")
    assert time.monotonic() - begun < 10
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert not weights.exists()


def test_a_multirun_does_only_what_is_missing(tmp_path: Path, run_py: RunPy) -> None:
    sweep = ["-m", "experiment=jacobian_distill", "method=ce", *TINY]
    assert run_py(*sweep, "seed=0,1").returncode == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").rglob("*.json")}
    assert len(before) == 2
    done = run_py(*sweep, "seed=0,1,2")
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path, "jacobian_distill")) == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert done.stdout.count("finished") == 3
    (_, table) = sorted((tmp_path / "outputs" / "hydra").glob("*/table.csv"))  # of the second multirun
    frame = pd.read_csv(table)
    scores = {run["seed"]: run["metrics"]["test/accuracy"] for run in records(tmp_path, "jacobian_distill").values()}
    assert dict(zip(frame["seed"], frame["test/accuracy"], strict=True)) == pytest.approx(scores)
    assert re.search(r"^ *seed +test/accuracy$", done.stdout, re.MULTILINE)  # what all runs share is left out


def test_a_search_that_is_typed_again_with_more_trials_goes_on(tmp_path: Path, run_py: RunPy) -> None:
    search = ["-m", "hydra/sweeper=search", "experiment=teacher", *TINY, "data.validation=0.1"]
    search += ["optim.optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    assert run_py(*search, "hydra.sweeper.n_trials=1").returncode == 0
    ((first, _),) = records(tmp_path, "teacher").items()
    done = run_py(*search, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stderr
    assert first in records(tmp_path, "teacher") and len(records(tmp_path, "teacher")) == 2
    assert done.stdout.count("validation/accuracy=") == 2 and "test/accuracy" not in done.stdout
    for record in records(tmp_path, "teacher").values():
        assert "validation/accuracy" in record["metrics"] and "test/accuracy" not in record["metrics"]


def quickest() -> Path:
    """A committed record whose run takes seconds and needs no data."""
    return next((ROOT / "results" / "runs" / "jacobian_illustration").glob("*.json"))


def test_a_record_is_shown_and_its_run_done_again_by_its_id(tmp_path: Path) -> None:
    file = quickest()
    record = json.loads(file.read_text())
    shown = run_python("run.py", "--show", file.stem[:6])
    assert shown.stdout.startswith(f"run {file.stem}\n")
    assert f"commit {record['git']['commit']}" in shown.stdout
    assert f"{record['metrics']['rms/jacobian']:.6g}" in shown.stdout
    answer = run_python("run.py", "--id", file.stem)
    assert answer.stdout.startswith(f"run {file.stem} finished")
    elsewhere = [f"paths.results={tmp_path}", f"paths.outputs={tmp_path}", "logger=none", "trainer.threads=1"]
    again = run_python("run.py", "--id", file.stem, *elsewhere)
    assert again.returncode == 0, again.stderr
    fresh = json.loads((tmp_path / "runs" / file.parent.name / file.name).read_text())
    assert fresh["metrics"] == pytest.approx(record["metrics"], rel=0.05)
    assert fresh["started"] != record["started"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--id"], "type python run.py --id ID"),
        (["--show", "0000"], "'0000' matches none in"),
        (["--show", "ab"], "4 or more characters"),
        (["--show", quickest().stem, "seed=3"], "seed=3: with --show only paths.results"),
        (["--id", quickest().stem, "seed=3"], "seed=3: with --id only paths, trainer"),
    ],
)
def test_what_is_no_id_is_an_error(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer(words)


def test_a_record_is_looked_for_in_the_named_folder_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = quickest()
    there = tmp_path / "quick" / "runs" / file.parent.name / file.name
    there.parent.mkdir(parents=True)
    there.write_bytes(file.read_bytes())
    (there.parent / f"{file.stem} (copy).json").write_text("")  # by a file manager
    for folder, found in ((tmp_path, there), (tmp_path / "empty", file)):
        answer(["--show", file.stem, f"paths.results={folder}"])
        assert capsys.readouterr().out.endswith(f"{found}\n")
    with pytest.raises(UserError, match=f"none in {tmp_path}/runs or "):
        answer(["--show", "0000", f"paths.results={tmp_path}"])


# run.py, killed as by kill -9 in the middle of its 70th checkpoint: the moment does not depend on how busy the machine is.
KILLED = """
import os, runpy, sys, gradexp.base.files
from gradexp.engine import callbacks
count = 0
def write_sealed(path, write):
    global count
    count += 1
    def dying(draft):
        write(draft)
        if count == 70:
            os.kill(os.getpid(), 9)
    gradexp.base.files.write_sealed(path, dying)
callbacks.write_sealed = write_sealed
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path("run.py", run_name="__main__")
"""


def test_kill_9_loses_nothing_but_time(tmp_path: Path) -> None:
    """Killed in the middle and started again: the same numbers as undisturbed, bit for bit."""
    common = ["experiment=teacher", *TINY, "data.per_class=8", "optim.passes=100", "trainer.checkpoint_every=0"]

    def call(name: str, script: Path = ROOT / "run.py") -> int:
        places = [f"paths.results={tmp_path / name}/results", f"paths.outputs={tmp_path / name}/outputs"]
        return run_python(script, *common, *places).returncode

    assert call("whole") == 0
    (tmp_path / "killed.py").write_text(KILLED)
    assert call("killed", tmp_path / "killed.py") == -signal.SIGKILL
    assert list((tmp_path / "killed").rglob("last.ckpt"))
    assert list((tmp_path / "killed").rglob(".last.ckpt.*"))
    assert not records(tmp_path / "killed", "teacher")
    assert call("killed") == 0
    (whole,), (killed,) = (records(tmp_path / name, "teacher").values() for name in ("whole", "killed"))
    assert killed["metrics"] == whole["metrics"]
    assert len(whole["metrics"]["train/loss"]) == 100
    first, second = ((tmp_path / name).rglob("weights.pt") for name in ("whole", "killed"))
    assert next(first).read_bytes() == next(second).read_bytes()
    assert not list((tmp_path / "killed").rglob("*last.ckpt*"))  # nor a draft of the one that died


def test_nan_is_a_result(tmp_path: Path, run_py: RunPy) -> None:
    done = run_py("experiment=teacher", *TINY, "optim.optimizer.lr=1e30", "optim.passes=20")
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path, "teacher").values()
    assert record["status"] == "diverged"
    assert record["metrics"]["test/accuracy"] is None
    assert len(record["metrics"]["train/loss"]) < 20
    assert "diverged: test/accuracy=nan" in done.stdout


MISTAKES = {
    "paths.results=data/rés": "is put in double quotes",
    "paths.results=a=b": """is put in double quotes: 'key="a=b"'""",
    'name=a"b é': "is put in double quotes",
    "=3": "'=3' is not of the form key=value",
    "method=glob(nope*)": "method=glob(nope*): nothing matches",
    "data={a: 1}": "Could not override 'data'",
    "method=nope": "there is no conf/method/nope.yaml",
    "method=ce_a_k": "did you mean ce_a_j?",
    "data.per_klass=1": "did you mean per_class?",
    "experimant=teacher": "did you mean experiment?",
    "seed": "not of the form key=value",
    "trainer.max_epochs=3": "did you mean optim.passes?",
    "lr=0.1": "did you mean optim.optimizer.lr?",
    "batch_size=3": "did you mean optim.batch_size?",
    "dataset=cifar10": "did you mean data?",
    "upstream.teacher.optim.passes=3": "is added with a plus: +upstream.teacher.optim.passes=",
    "method.terms.jacobian.wieght=1": "did you mean weight?",
    "method=_distilation": "did you mean _distillation?",
    "upstream.teacher=teacher": "upstream.teacher=teacher: expected the settings of a run",
    "paths.results=": "paths.results names no folder",
    "~paths.outputs": "paths.outputs names no folder",
    "optim.optimizer.lr=interval(1e-2,1e-4)": "from a smaller to a larger number",
    "optim.optimizer.lr=tag(log,interval(0,1e-2))": "on a log scale above 0",
    "hydra.sweeper.n_trials=0": "hydra.sweeper.n_trials=0: a search has a number of trials",
    "hydra.sweeper.direction=min": "hydra.sweeper.direction=min: it is maximize or minimize",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_misspelt_overrides_name_the_nearest_right_word(mistake: str) -> None:
    with pytest.raises(UserError) as caught:
        check_overrides(["experiment=jacobian_distill", mistake])
    assert MISTAKES[mistake] in str(caught.value)


UNUSED = {
    ("method=ce", "+upstream.start.experiment=teacher"): r"method ce uses no upstream run.*\[start\]",
    ("method=ce_a", "+upstream.teachr={experiment: teacher}"): r"method ce_a uses teacher, did you mean teacher\?",
    ("method.upstream=[strat]", "+upstream.strat.experiment=teacher", "method=ce"): "reads teacher, start, maps, did you mean",
    ("method=ce", "model.classes=12"): r"it gives \(1, 12\), expected \(1, 10\)",
    ("method=ce", "model.channels=1"): r"it does not take images of 3 x 32 x 32",
    ("method=ce", "data.classes=5"): r"data\.classes=5: digits has 10",
    ("method=ce", "data=cifar10", "data.size=16"): "data.size=16: images of CIFAR-10 have 32",
    ("method=ce", "+data.seed=5"): r"data\.seed: it follows from other settings",
    ("method=ce", "+method.angle=label"): "method=ce has no teacher",
    ("method=ce", "+method.dropout={layer: last}"): r"method\.dropout\.probability is missing",
    ("method=ce", "+method.dropout={layer: last, probability: 0.5, p: 1}"): "there is no key p in method.dropout",
    ("method=ce_a", "+method.dropout={layer: lost, probability: 0.5}"): "VGG has no layer 'lost'.*did you mean last",
    ("method=ce_a", "+method.angle=lable"): "method.angle=lable: it is .*, did you mean label",
    ("method=ce", "optim.optimizer._target_=torch.optim.LBFGS"): "LBFGS evaluates the loss several times a step",
    ("method=ce", "optim.optimizer._target_=torch.optim.SparseAdam"): "SparseAdam does not support dense gradients",
    ("method=ce", "+optim.optimizer.betas=[0.5]"): "optim.optimizer.betas",
    (
        "method=ce",
        "optim.optimizer._target_=torch.optim.Sgd",
    ): r"optim\.optimizer\._target_=torch\.optim\.Sgd: torch\.optim has no",
    ("method=ce", "model.layers=[64,X]"): r"model\.layers: 'X' is neither a number of channels nor M",
    ("method=ce", "model.layers=[0]"): r"model\.layers: 0 is neither a number of channels nor M",
    ("method=ce", "trainer.devices=2000"): "2000 devices can't share a batch of",
    ("method=ce", "~model"): r"jacobian_distill has no model, which its task reads; add it: \+model=NAME",
    ("method=ce", "task=noise"): r"needs a model; name the experiment that makes it: \+upstream\.model\.experiment=NAME",
    ("method=ce", "task=noise", "task.sigmas=[]"): r"task\.sigmas=\[\]: it .*at least 1 item",
    ("method=ce_j", "~method.terms.jacobian.weight"): r"method\.terms\.jacobian\.weight is missing: Jacobian needs it",
    ("method=ce", "task=pretrained"): "reads weights of a network of torchvision",
    ("method=ce_j", "method.terms.jacobian.target=lable"): r"method\.terms\.jacobian\.target=lable: .*did you mean label",
}


@pytest.mark.parametrize("words", UNUSED, ids=" ".join)
def test_settings_that_fit_nothing_are_refused_before_the_training(words: tuple[str, ...], places: list[str]) -> None:
    with pytest.raises(UserError, match=UNUSED[words]):
        ensure(plan(["experiment=jacobian_distill", *TINY, "data.per_class=3", *words], places))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("~evaluate.batch_size", r"evaluate\.batch_size is missing, .*\+evaluate\.batch_size=VALUE"),
        ("evaluate.fractions=[]", r"evaluate\.fractions=\[\]: it .*at least 1 item"),
        ("evaluate.fractions=[2.0]", r"evaluate\.fractions=\[2\.0\]: it should be less than or equal to 1"),
    ],
)
def test_settings_of_a_score_are_checked_before_the_training(word: str, message: str, places: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        ensure(plan(["experiment=pixel_perturbation", "scale=quick", word], places))


@pytest.mark.parametrize("setting", ["task.sampling.start", "task.denoising.noise"])
def test_samples_without_a_start_are_refused_before_the_training(setting: str, places: list[str]) -> None:
    with pytest.raises(UserError, match=f"{setting} is null: set the "):
        ensure(plan(["experiment=implicit_samples", "scale=quick", f"{setting}=null"], places))


def test_an_upstream_run_that_a_check_reads_is_named(places: list[str]) -> None:
    with pytest.raises(UserError, match=r"gan_test needs a judge; .*\+upstream\.judge\.experiment=NAME"):
        ensure(plan(["experiment=gan_test", "scale=quick", "~upstream.judge"], places))


@pytest.mark.parametrize(
    ("logits", "message"), [((torch.zeros(1, 10),), "returns a tuple, where logits"), (torch.zeros(1, 9), r"it gives \(1, 9\)")]
)
def test_a_network_that_returns_no_logits_is_refused(
    logits: Any, message: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VGG, "forward", Mock(return_value=logits))
    with pytest.raises(UserError, match=message):
        ensure(plan(["experiment=jacobian_distill", *TINY, "data.per_class=3", "method=ce"], places))


def test_a_folder_on_a_disk_that_is_not_mounted_is_told(tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"paths\.outputs=.*scratch is a link to a folder that does not exist; is its disk mounted"
    ):
        check_overrides(["experiment=teacher", f"paths.outputs={tmp_path}/scratch/mine"])


def test_a_device_without_memory_is_not_called_a_network_of_another_shape(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VGG, "forward", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        ensure(plan(["experiment=jacobian_distill", *TINY, "data.per_class=3", "method=ce"], places))


def test_what_an_upstream_run_of_the_experiment_needs_may_be_set_for_all_methods(places: list[str]) -> None:
    """A sweep over methods, of which one has no teacher."""
    assert plan([*DISTILL, "method=ce"], places).id == plan(["experiment=jacobian_distill", *TINY, "method=ce"], places).id


def test_betas_are_a_list_and_null_settings_are_none(places: list[str]) -> None:
    adam, rprop = ["+optim.optimizer.betas=[0.5,0.9]"], ["optim.optimizer._target_=torch.optim.Rprop"]
    for words in (adam, rprop):  # Rprop has no weight decay
        assert ensure(plan(["experiment=teacher", *TINY, "optim.passes=1", "data.per_class=3", *words], places))["metrics"]


def test_a_mistyped_trainer_is_refused_where_a_record_answers(places: list[str]) -> None:
    words = ["experiment=teacher", *TINY, "optim.passes=1", "data.per_class=3"]
    ensure(plan(words, places))
    with pytest.raises(UserError, match=r"trainer\.precision"):
        ensure(plan([*words, "trainer.precision=64"], places))


def test_a_record_of_other_code_of_ones_own_says_so(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=teacher", *TINY, "optim.passes=1", "data.per_class=3"]
    monkeypatch.setattr(plugins, "packages", lambda: {"mine": Path("mine")})
    monkeypatch.setitem(ensuring.SOURCES, "mine", "a")
    run = plan(words, places)
    of_mine = [("model", {"_target_": "mine.nets.Net"})]
    for digest, built, told in (("a", [], False), ("a", of_mine, False), ("b", of_mine, True), ("b", [], False)):
        monkeypatch.setitem(ensuring.SOURCES, "mine", digest)
        monkeypatch.setattr(ensuring, "targets", lambda _, built=built: built)
        ensure(run)
        assert (f"{run.id}: answered from its record, and mine has changed since" in capsys.readouterr().out) == told


def test_a_sweep_is_checked_before_its_first_run() -> None:
    with pytest.raises(UserError, match="did you mean ce_a"):
        check_overrides(["-m", "experiment=jacobian_distill", "method=ce,ce_aa", "seed=range(0,3)"])
    check_overrides(["-m", "experiment=jacobian_distill", "method=ce,ce_a", "seed=range(0,3)", "hydra/launcher=joblib"])
    configs = check_overrides(["-m", "experiment=jacobian_distill", "method=glob(ce_a*)"])
    assert [config["method"]["name"] for config in configs] == ["ce_a", "ce_a_10", "ce_a_j"]


def test_quoted_values_are_what_was_meant() -> None:
    (config,) = check_overrides(["experiment=jacobian_distill", 'paths.results="data/rés=1"'])
    assert config["paths"]["results"] == "data/rés=1"


def test_set_may_be_repeated() -> None:
    given = common.arguments(None).parse_args(["--set", "trainer.threads=1", "logger=none", "--set", "trainer.precision=32"])
    assert given.set == ["trainer.threads=1", "logger=none", "trainer.precision=32"]


def errors() -> Iterator[Any]:
    yield pytest.param(["method=nope"], "there is no conf/method/nope.yaml", id="method")
    yield pytest.param(["data.per_klass=1"], "did you mean per_class?", id="key")
    yield pytest.param(["data=digits", "data.per_class=501"], "ask for at most", id="per_class")
    yield pytest.param(["data=cifar10", "paths.data=/nowhere"], "GRADEXP_DATA=FOLDER", id="data root")
    yield pytest.param(["+method.terms.cross_entropy.reduction=sum", "data=digits"], "takes no such key", id="term")
    yield pytest.param(["method.terms.jacobian._target_=os.system", "data=digits"], "is refused", id="target")


@pytest.mark.parametrize(("words", "message"), errors())
def test_mistakes_are_short_errors_that_leave_nothing(tmp_path: Path, run_py: RunPy, words: list[str], message: str) -> None:
    done = run_py("experiment=jacobian_distill", "scale=quick", "logger=none", *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_an_outputs_folder_that_can_not_be_is_an_error(tmp_path: Path, run_py: RunPy) -> None:
    (tmp_path / "outputs").write_text("a file")
    done = run_py("experiment=shift", "scale=quick", "logger=none")
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "name another folder" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_term_without_its_teacher_is_an_error(run_py: RunPy) -> None:
    term = "+method.terms.a={_target_: gradexp.terms.Activations, weight: 1, reduction: mean}"
    done = run_py("experiment=teacher", *TINY, term)
    assert "needs a teacher" in done.stderr


def test_run_all_trains_a_shared_teacher_once_and_reports_failures(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = [plan([*DISTILL, f"method={method}", "data.per_class=1"], places) for method in ("a", "ce")]
    bad = plan([*DISTILL, "method=a", "data.per_class=1000"], places)
    failures = run_all([*good, bad], workers=2, extra=["trainer.threads=1", "logger=none", *places])
    assert len(records(tmp_path, "teacher")) == 1
    assert len(records(tmp_path, "jacobian_distill")) == 2
    (failure,) = failures
    assert "per_class=1000" in failure.command
    assert "ask for at most" in failure.log.read_text()
    told = capsys.readouterr().out
    assert told.count("finished") == 3
    assert re.findall(r"^\[(\d)/4\]", told, flags=re.MULTILINE) == list("1234")  # the teacher is counted too


def test_a_target_that_can_not_be_imported_says_why() -> None:
    with pytest.raises(UserError, match=r"torch\.optim has no Adem, did you mean Adam"):
        locate("torch.optim.Adem", "optim.optimizer")
    with pytest.raises(UserError, match=r"there is no such class or function \(No module named 'gradexp\.data\.digit'"):
        locate("gradexp.data.digit.Digits", "data")


def test_a_module_that_fails_to_load_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradexp.data.dataset", None)
    monkeypatch.delitem(sys.modules, "gradexp.data.digits", raising=False)
    with pytest.raises(UserError, match=r"gradexp\.data\.digits can't be imported \(import of gradexp\.data\.dataset halted"):
        locate("gradexp.data.digits.Digits", "data")


def test_w_and_b_offline(tmp_path: Path, run_py: RunPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_py("experiment=teacher", *[word for word in TINY if word != "logger=none"], "logger=wandb")
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path, "teacher").values()
    (logged,) = tmp_path.rglob("*.wandb")
    for shown in ("learning_rate", "train/loss", "test/accuracy", record["git"]["commit"], record["data"]["train"]):
        assert shown.encode() in logged.read_bytes(), shown


@pytest.mark.parametrize("experiment", ["jacobian_distill", "pixel_perturbation"])
def test_networks_that_would_see_pixels_in_other_units_are_refused(experiment: str) -> None:
    with pytest.raises(UserError, match=r"data\.normalise is none, and of upstream\.\w+, .*, standard"):
        plan([f"experiment={experiment}", "scale=quick", "data.normalise=none"])


def test_hydras_own_options_are_no_misspelt_overrides() -> None:
    check_overrides(["--cfg", "job", "experiment=teacher"])
    with pytest.raises(UserError, match="not of the form key=value"):
        check_overrides(["job", "experiment=teacher"])


def test_help_lists_every_experiment_with_what_it_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = help.text([])
    assert max(map(len, shown.splitlines())) <= 120
    for file in (CONF / "experiment").glob("[!_]*.yaml"):
        assert re.search(rf"^  {file.stem}\s+[A-Z§]", shown, re.MULTILINE), file.stem
    for example in help.EXAMPLES:
        words = shlex.split(example)
        if words[0] != "--show":
            check_overrides([word for word in words if word != "--help"])


def test_help_on_an_experiment_is_the_head_of_its_file() -> None:
    shown = help.text(["experiment=jacobian_distill"])
    assert "make table-2.1" in shown and "Cost at scale=cpu" in shown and "defaults:" not in shown
    with pytest.raises(UserError, match="did you mean jacobian_distill"):
        help.text(["experiment=jacobian_distil"])


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--help"], "python run.py experiment=NAME"),
        (["experiment=teacher", "-h"], "experiment=teacher\n"),
        (["--version"], "gradexp 0.1.0, commit "),
        (["--shell-completion", "install=bash"], "export _HYDRA_OLD_COMP"),
    ],
)
def test_options_about_the_command_itself(words: list[str], start: str) -> None:
    done = run_python("run.py", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(start)


def test_tab_completes_groups_and_their_choices() -> None:
    line = "python run.py experiment=jacobian_d"
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = run_python("run.py", "--shell-completion", "query=bash", env=environment)
    assert done.stdout.split() == ["experiment=jacobian_distill"]


def test_the_values_of_a_sweep_are_checked_before_its_first_run(tmp_path: Path, run_py: RunPy) -> None:
    done = run_py("-m", "experiment=teacher", *TINY, "optim.passes=2,2.5")
    assert (done.returncode, done.stderr) == (1, "error: optim.passes=2.5: it should be a valid integer\n")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("word", ["model=null", "scale=null", "saliency=null"])
def test_a_group_needs_a_choice(word: str) -> None:
    with pytest.raises(UserError, match=f"{word}: Config group override must be a string"):
        check_overrides(["experiment=teacher", word])


def test_keys_of_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="the key 2 is no text, as a record in JSON needs it"):
        compose._check_finite({"task": {"sizes": {2: 1}}})


def test_texts_of_upstream_runs_are_quoted_where_hydra_would_read_something_else() -> None:
    words = compose._as_overrides({"data": {"name": "a,b", "choice": "digits"}, "task": {"file": "x-1.pth"}, "seed": 3})
    assert words == ['data.name="a,b"', "data=digits", "task.file=x-1.pth", "seed=3"]


def test_hydras_own_keys_may_be_forced() -> None:
    check_overrides(["experiment=teacher", "++hydra.verbose=false"])
