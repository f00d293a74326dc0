"""Identity, records and the lock."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from gradexp.base.errors import UserError
from gradexp.base.files import sha256, write_atomically
from gradexp.engine import build, clocks, ensure, origin, record, run
from gradexp.engine import compose as compose_module
from gradexp.engine.build import check_settings
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.run import Config, Paths, Run
from gradexp.engine.task import Result, Task, Upstream
from gradexp.report import provenance, specs

BASE = ["experiment=jacobian_distill", "scale=quick"]


def identity_of(*words: str) -> str:
    return run.run_id(compose_run([*BASE, *words]))


@pytest.mark.parametrize(
    "change",
    ["trainer.precision=32", "trainer.threads=1", "logger=none", "paths.outputs=elsewhere", "gradients.backend=autograd"],
)
def test_hardware_is_not_part_of_the_id(change: str) -> None:
    assert identity_of(change) == identity_of()


SCIENCE = ["seed=1", "data.per_class=1", "data.crop=0", "optim.passes=7", "optim.batch_size=64", "method=a", "model=vgg6"]
SCIENCE += ["method.terms.jacobian.target=top", "upstream.teacher.seed=1", "task.version=2", "scale=cpu"]


@pytest.mark.parametrize("change", SCIENCE)
def test_science_is_part_of_the_id(change: str) -> None:
    assert identity_of(change) != identity_of()


def test_weight_0_null_and_number_formats_do_not_matter() -> None:
    assert identity_of("method=ce_a_j", "method.terms.jacobian.weight=0", "method.name=ce_a") == identity_of("method=ce_a")
    assert identity_of("method.terms.jacobian.weight=1.0") == identity_of()
    config = compose_run(BASE)
    config["model"]["new_switch"] = None
    assert run.run_id(config) == identity_of()


def test_a_student_shares_the_teacher_that_is_trained_alone() -> None:
    teacher = compose_run(["experiment=teacher", "scale=quick"])
    student = compose_run(BASE)
    assert run.run_id(student["upstream"]["teacher"]) == run.run_id(teacher)


def test_a_run_that_looks_at_a_model_has_no_method_and_needs_all_its_upstream() -> None:
    """Groups switched off with null leave the config, and so the id."""
    words = ["experiment=teacher", "scale=quick", "~method", "~optim", "~model", "name=look"]
    config = compose_run([*words, "+upstream.model.experiment=teacher"])
    assert set(config) & {"method", "optim", "model"} == set()
    assert run.run_id(config["upstream"]["model"]) == run.run_id(compose_run(["experiment=teacher", "scale=quick"]))


def test_a_misspelt_key_of_a_method_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no key droput in method, did you mean dropout"):
        compose_run(["experiment=teacher", "+method.droput=0.5"])


WITH_DATA = {file.stem for file in (run.ROOT / "conf" / "experiment").glob("[!_]*.yaml")} - {"jacobian_illustration"}


@pytest.mark.parametrize("name", sorted(WITH_DATA))
def test_images_that_are_held_out_are_held_out_of_all_trainings_below(name: str) -> None:
    """A score of held-out images, by which a sweep chooses, is of networks that have not seen them."""
    words = [f"experiment={name}", "scale=cpu", "data.validation=0.1"]
    waiting = [plan(words)]
    here = waiting[0].config["data"]["name"]
    while waiting:
        data = waiting[0].config["data"]
        assert data["name"] != here or data["validation"] == 0.1
        waiting += waiting.pop(0).upstream.values()


def test_a_training_with_images_that_are_held_out_is_refused() -> None:
    words = ["experiment=digit_flip", "data.validation=0.1", "++upstream.model.data.validation=0.2"]
    with pytest.raises(
        UserError, match=r"is of a training with them; hold out the same: \+upstream\.model\.data\.validation=0\.1"
    ):
        plan(words)


def test_a_method_without_teacher_has_no_upstream() -> None:
    assert compose_run([*BASE, "method=ce"])["upstream"] == {}


WHOLE = min((run.ROOT / "results" / "runs" / "teacher").glob("*.json"))


def copied(folder: Path, **changes: Any) -> Path:
    """A committed record with changes, below `folder`."""
    path = folder / WHOLE.parent.name / WHOLE.name
    record.write_record(path, record.read_record(WHOLE) | changes)
    return path


def test_arrays_lie_beside_the_record_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / WHOLE.parent.name / WHOLE.name
    maps = {"maps": np.arange(6, dtype=np.float32).reshape(2, 3)}
    facts = record.write_arrays(path.with_suffix(".npz"), maps)
    copied(tmp_path, arrays=facts)
    assert (record.read_arrays(path)["maps"] == maps["maps"]).all()
    path.with_suffix(".npz").write_bytes(b"something else")
    with pytest.raises(UserError, match="delete both and run again"):
        record.read_arrays(path)


def test_records_are_sorted_small_and_know_nan(tmp_path: Path) -> None:
    metrics = {"test/accuracy": float("nan"), "train/loss": [1.0, float("inf")]}
    path = copied(tmp_path, metrics=metrics, a=1)
    text = path.read_text()
    assert '"train/loss": [1.0, null]' in text
    assert text.index('"a"') < text.index('"metrics"')
    assert record.read_record(path)["metrics"]["test/accuracy"] is None


def test_long_curves_move_beside_the_record(tmp_path: Path) -> None:
    curve = [float(i) / 7 for i in range(20_000)]
    path = copied(tmp_path, metrics={"train/loss": curve, "test/accuracy": 1.5})
    assert path.stat().st_size < record.RECORD_LIMIT
    assert record.read_record(path)["metrics"] == {"train/loss": curve, "test/accuracy": 1.5}


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"metrics": ')
    with pytest.raises(UserError, match="delete it and run again"):
        record.read_record(path)


def test_atomic_writes_leave_the_old_content_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


# --- ensure -----------------------------------------------------------------------------------------------


def toy(tmp_path: Path, **changes: Any) -> Run:
    """A run of the task below; it counts how often it is really done."""
    config = {
        "name": "toy",
        "seed": 0,
        "scale": {"name": "quick"},
        "upstream": {},
        "task": {"_target_": "test_runs.Toy"},
        "paths": {"data": "data", "results": str(tmp_path / "results"), "outputs": str(tmp_path / "outputs")},
        **changes,
    }
    return Run(config, Paths.of(config))


def work(run: Run) -> Result:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "done").open("a") as file:
        file.write("x")
    run.weights.write_bytes(b"weights")
    return Result({"test/accuracy": 50.0 + run.config["seed"]})


class Toy(Task):
    """Does what a test puts into `does`."""

    product = "weights.pt"
    does: Callable[[Run], Result] = staticmethod(work)

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        assert all(below.product.exists() for below in upstream.values())
        return Toy.does(run)


def student_of_rebuilt(teacher: Run, tmp_path: Path, seed: int = 0) -> Config:
    """The record of a run that stands on `teacher`, whose weights are lost and made again."""
    teacher.weights.unlink()
    below = {key: value for key, value in teacher.config.items() if key != "paths"}
    return ensure.ensure(toy(tmp_path, seed=seed, upstream={"teacher": below}))


@pytest.fixture
def _toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "does", staticmethod(work))
    monkeypatch.setitem(build.KINDS, "task", build.Kind("a task", ("test_runs.Toy",)))


def times_done(run: Run) -> int:
    done = run.folder / "done"
    return len(done.read_text()) if done.exists() else 0


def test_code_of_an_earlier_commit_is_not_the_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server forks processes with what it once loaded, whatever has been committed since."""
    commit = origin.git_state()["commit"] or pytest.skip("no repository here")
    monkeypatch.setenv(origin.LOADED, commit)
    before = origin.git_state()
    monkeypatch.setenv(origin.LOADED, "0" * 40)
    assert origin.git_state() | {"changes": ""} == {"commit": commit, "dirty": True, "changes": ""}
    assert before["commit"] == commit


@pytest.mark.usefixtures("_toy_task")
def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    run = toy(tmp_path)
    assert ensure.ensure(run) == ensure.ensure(toy(tmp_path)) == json.loads(run.record_path.read_text())
    assert times_done(run) == 1


@pytest.mark.usefixtures("_toy_task")
def test_upstream_runs_come_first_and_are_shared(tmp_path: Path) -> None:
    below = {key: value for key, value in toy(tmp_path, seed=7).config.items() if key != "paths"}
    for seed in (0, 1):
        record = ensure.ensure(toy(tmp_path, seed=seed, upstream={"teacher": below}))
        assert record["upstream"]["teacher"]["id"] == run.run_id(below)
    assert times_done(toy(tmp_path, seed=7)) == 1


@pytest.mark.usefixtures("_toy_task")
def test_deleted_weights_are_rebuilt_and_the_record_stays(tmp_path: Path) -> None:
    teacher = toy(tmp_path, seed=7)
    before = ensure.ensure(teacher)
    student_of_rebuilt(teacher, tmp_path)
    assert times_done(teacher) == 2
    assert teacher.record() == before


@pytest.mark.usefixtures("_toy_task")
def test_seconds_are_a_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a run's upstream, at any depth, nor its rebuilding counts."""
    now = [0.0]
    monkeypatch.setattr(clocks, "read", lambda: {"wall": now[0], "cpu": now[0] / 2})

    def slow(run: Run) -> Result:
        result = work(run)
        now[0] += 10 ** run.config["seed"]
        return result

    monkeypatch.setattr(Toy, "does", staticmethod(slow))
    bare = [{key: value for key, value in toy(tmp_path, seed=seed).config.items() if key != "paths"} for seed in (2, 1)]
    middle = bare[1] | {"upstream": {"start": bare[0]}}
    seconds = []
    for seed in (0, -1):
        record = ensure.ensure(toy(tmp_path, seed=seed, upstream={"teacher": middle}))
        seconds.append(record["seconds"])
        toy(tmp_path, **middle).weights.unlink()
    assert seconds == [{"wall": 1, "cpu": 0.5}, {"wall": 0.1, "cpu": 0.05}]


@pytest.mark.usefixtures("_toy_task")
def test_a_run_that_diverges_again_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN is null in its record. Its arrays stay as they were: the record holds their digest."""

    def diverge(run: Run) -> Result:
        work(run)
        return Result({"test/accuracy": float("nan")}, "diverged", arrays={"x": np.random.default_rng().random(3)})

    monkeypatch.setattr(Toy, "does", staticmethod(diverge))
    teacher = toy(tmp_path, seed=7)
    ensure.ensure(teacher)
    before = record.read_arrays(teacher.record_path)["x"]
    student_of_rebuilt(teacher, tmp_path)
    assert "same numbers as its record\n" in capsys.readouterr().out
    np.testing.assert_array_equal(record.read_arrays(teacher.record_path)["x"], before)


@pytest.mark.usefixtures("_toy_task")
def test_a_teacher_that_is_rebuilt_to_other_weights_is_told_by_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on another machine: its record stays, and its user's record names the file that was used."""

    def elsewhere(run: Run) -> Result:
        done = work(run)
        run.weights.write_bytes(b"other weights")
        return Result({name: float(str(value)) + 0.25 for name, value in done.metrics.items()})

    teacher = toy(tmp_path, seed=7)
    before = ensure.ensure(teacher)
    monkeypatch.setattr(Toy, "does", staticmethod(elsewhere))
    student = student_of_rebuilt(teacher, tmp_path)
    assert "test/accuracy 57.0 -> 57.25" in capsys.readouterr().out
    assert teacher.record() == before
    used = student["upstream"]["teacher"]["weights_sha256"]
    assert used == sha256(teacher.weights) != before["product"]["sha256"]
    assert "ran more than once" in provenance.origin_of([student], [before]).sentences[1]
    same = student | {"upstream": {"teacher": student["upstream"]["teacher"] | {"weights_sha256": before["product"]["sha256"]}}}
    assert len(provenance.origin_of([same], [before]).sentences) == 1


@pytest.mark.usefixtures("_toy_task")
def test_files_that_are_rebuilt_otherwise_are_noted_though_no_number_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saliency maps have no metric of their own: their digests say that they are others."""
    digests = iter("abc")

    def maps(run: Run) -> Result:
        work(run)
        return Result({"maps/test": 5.0}, facts={"sha256": {"test.npy": next(digests)}})

    monkeypatch.setattr(Toy, "does", staticmethod(maps))
    upstream = toy(tmp_path, seed=7)
    ensure.ensure(upstream)
    student_of_rebuilt(upstream, tmp_path)
    assert "same numbers as its record, from other files" in capsys.readouterr().out


@pytest.mark.usefixtures("_toy_task")
def test_a_training_that_ends_at_the_same_number_by_another_curve_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([2.25, 2.5, 2.25])  # of the teacher, of the teacher again, of its student

    def other(run: Run) -> Result:
        return Result(work(run).metrics | {"train/loss": [4.0, next(losses)]})

    monkeypatch.setattr(Toy, "does", staticmethod(other))
    teacher = toy(tmp_path, seed=7)
    ensure.ensure(teacher)
    student_of_rebuilt(teacher, tmp_path)
    assert "same numbers as its record, by other curves" in capsys.readouterr().out


def _compete(tmp_path: Path, barrier: Any, results: Any) -> None:
    import time

    def slowly(run: Run) -> Result:
        time.sleep(1)
        return work(run)

    Toy.does = staticmethod(slowly)
    barrier.wait()
    results.put(ensure.ensure(toy(tmp_path)))


@pytest.mark.usefixtures("_toy_task")
def test_of_two_workers_one_works_and_both_get_the_record(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_compete, args=(tmp_path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = results.get(timeout=30), results.get(timeout=30)
    for worker in workers:
        worker.join()
    assert first == second
    assert times_done(toy(tmp_path)) == 1


@pytest.mark.usefixtures("_toy_task")
def test_a_dead_workers_lock_is_free(tmp_path: Path) -> None:
    def hold() -> None:
        with ensure._locked(toy(tmp_path)):
            ready.set()
            import time

            time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hold)
    worker.start()
    assert ready.wait(20)
    worker.kill()
    worker.join()
    assert ensure.ensure(toy(tmp_path))["status"] == "finished"


@pytest.mark.usefixtures("_toy_task")
def test_a_failing_run_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Run) -> Result:
        raise UserError("no")

    monkeypatch.setattr(Toy, "does", staticmethod(fail))
    with pytest.raises(UserError):
        ensure.ensure(toy(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_digests_of_runs_of_one_kind_do_not_hide_each_other() -> None:
    """A judge and a model both have weights."""
    used = {"model": {"id": "a", "weights_sha256": "1"}, "judge": {"id": "b", "weights_sha256": "2"}}
    assert record.used_digests(used | {"maps": {"id": "c", "maps_sha256": "3"}}) == {"model": "1", "judge": "2", "maps": "3"}


@pytest.mark.parametrize(
    "words",
    [
        "experiment=jacobian_distill scale=cpu method=ce_a_j data.per_class=5 seed=3 optim.passes=7",
        "experiment=jacobian_distill data.per_class=5 scale=cpu method.terms.jacobian.weight=0.5 method=ce_a_j",
        "experiment=gan_test scale=cpu +upstream.model.optim.passes=3 upstream.model.method.choice=ce ++seed=2",
        "experiment=gan_test scale=quick ++upstream.model.optim={passes:3,batch_size:7} ~upstream.judge",
        "experiment=teacher scale=quick trainer.threads=2 paths.results=somewhere data=cifar10 data.per_class=null",
        "experiment=jacobian_distill scale=cpu optim.batch_size=500 data.per_class=7 optim.schedule.at=[0.5]",
        "experiment=jacobian_transfer scale=quick upstream.teacher.optim.passes=3 method.terms.jacobian.student_layers=[a]",
        "experiment=noise_robustness data.name=other upstream.model.model.width=null scale=cpu",
        "experiment=pixel_perturbation data=cifar100 explained=teacher evaluate.images=9 scale=paper",
    ],
)
def test_values_are_set_as_hydra_sets_them(words: str) -> None:
    """Also when others were set on the same choices of groups before."""
    overrides = tuple(words.split())
    with initialize_config_dir(str(compose_module.CONF), version_base="1.3"):
        expected = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    assert compose_module._compose_anew((*overrides, "++seed=11", "trainer.threads=13")) != expected
    assert compose_module._compose_anew(overrides) == expected


def test_a_scale_without_a_value_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a defaults list, and in a value."""
    shutil.copytree(compose_module.CONF, tmp_path / "conf")
    (tmp_path / "conf" / "scale" / "tiny.yaml").write_text("name: tiny\nwidth: 0.1\nig_steps: 3\n")
    monkeypatch.setattr(compose_module, "CONF", tmp_path / "conf")
    groups = ("data=digits", "logger=csv", "optim=mnist", "paths.results=elsewhere")
    for words, known in (((), "{paper: wandb, cpu: wandb, quick: csv}"), (groups, "{paper: 4, cpu: 0, quick: 4}")):
        with pytest.raises(UserError) as caught:
            compose_module._compose_anew(("experiment=teacher", "scale=tiny", *words))
        assert str(caught.value) == f"scale=tiny: by_scale:{known} in conf/ has no value for it; add 'tiny: VALUE' there"


WRONG = {
    "seed=4294967296": "seed=4294967296 should be less than 4294967296",
    "name=../../escaped": "name='../../escaped' should be a name",
    "seed=1.5": "seed=1.5 should be a valid integer",
    "seed=null": "seed=None should be a valid integer",
    "seed='0'": "seed='0' should be a valid integer",
    "seed=true": "seed=True should be a valid integer",
    "optim.batch_size=8.0": "optim.batch_size=8.0: it should be a valid integer",
    "optim.batch_size='8'": "optim.batch_size=8: it should be a valid integer",
    "optim.optimizer.lr=nan": "optim.optimizer.lr=nan: it should be a finite number",
    "optim.optimizer.lr=inf": "optim.optimizer.lr=inf: it should be a finite number",
    "optim.optimizer.lr=-1": "optim.optimizer: Invalid learning rate: -1",
    "optim.optimizer.weight_decay=-1": "optim.optimizer: Invalid weight_decay value: -1",
    "method.terms.jacobian.weight=nan": "method.terms.jacobian.weight=nan: it should be a finite number",
    "data.per_class=1.5": "data.per_class=1.5: it should be a valid integer",
    "data.flip=no": "data.flip=no: it should be a valid boolean",
    "data.crop=2.0": "data.crop=2.0: it should be a valid integer",
    "data.crop=-1": "data.crop=-1: it should be greater than or equal to 0",
    "seed=x": "seed='x' should be a valid integer",
    "seed=-1": "seed=-1 should be greater than or equal to 0",
    "gradients.backend=fats": "gradients.backend='fats' should be 'fast' or 'autograd'",
    "optim.passes=abc": "optim.passes=abc: it should be a valid integer",
    "optim.passes=2.5": "optim.passes=2.5: it should be a valid integer",
    "optim.batch_size=0": "optim.batch_size=0: it should be greater than or equal to 1",
    "optim.optimizer.lr=high": "optim.optimizer.lr=high: it should be a valid number",
    "data.per_class=0": "data.per_class=0: it should be greater than or equal to 1",
    "data.validation=1": "data.validation=1: it should be less than 1",
    "model.width=wide": "model.width=wide: it should be a valid number",
    "model.dropout=1": "model.dropout=1: it should be less than 1",
    "+model.dropuot=0.1": "VGG takes no such key, did you mean dropout?",
    "method.terms.jacobian.weight=-1": "method.terms.jacobian.weight=-1: it should be greater than or equal to 0",
    "trainer.threads=0": "trainer.threads=0: it should be greater than or equal to 1",
}


@pytest.mark.parametrize("size", ["0", "'8'", "8.0", "null"])
def test_a_wrong_batch_size_is_refused_where_lengths_are_computed_from_it(size: str) -> None:
    """At scale=cpu the length of a training is an expression of the batch size."""
    with pytest.raises(UserError, match=r"optim\.batch_size=.*: it should be"):
        check_settings(plan(["experiment=jacobian_distill", "scale=cpu", f"optim.batch_size={size}"]).config)


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_value_is_refused_in_one_line_before_any_work(word: str, tmp_path: Path) -> None:
    words = ["experiment=jacobian_distill", "scale=quick", f"paths.results={tmp_path}", f"paths.outputs={tmp_path}", word]
    with pytest.raises(UserError) as caught:
        ensure.ensure(plan(words))
    assert WRONG[word] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_every_committed_config_and_every_cell_passes_the_check() -> None:
    """Also the configs that upstream runs have; hardware aside, which older records have other settings of."""

    def check(config: Config) -> None:
        check_settings({key: value for key, value in config.items() if key != "trainer"})

    for file in sorted((run.ROOT / "results" / "runs").glob("*/*.json")):
        check(json.loads(file.read_text())["config"])
    for scale in ("paper", "cpu", "quick"):
        for spec in specs.every(scale).values():
            for cell in specs.cells(spec, scale):
                for words in list(cell.commands.values())[:1]:
                    check(plan(words).config)


def test_ctrl_c_while_hydra_composes_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """OmegaConf tidies up after it, fails, and raises an error of its own."""

    def interrupted(*_: Any, **__: Any) -> None:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                None._invalidate_flags_cache()  # type: ignore[attr-defined]
        except AttributeError as error:
            raise HydraException from error

    monkeypatch.setattr(compose_module, "_with_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compose_module._compose_anew(("experiment=teacher", "seed=123456"))
