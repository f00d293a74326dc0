"""What a number rests on: repeats, schemas, verification, files that are never executed."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gradexp.base import files
from gradexp.base.errors import Stopped, UserError
from gradexp.data.digits import Digits
from gradexp.data.sources import Split
from gradexp.engine import record as records
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.record import differing_split, read_record, write_record
from gradexp.engine.run import HARDWARE, ROOT, Paths, Run, run_id
from gradexp.engine.verify import Finding, alike, repeat_own, verify
from gradexp.terms.jacobian import Jacobian

TINY = ["scale=quick", "scale.width=0.04", "optim.passes=2", "data.per_class=3", "trainer.threads=1", "logger=none"]
DISTILL = ["experiment=jacobian_distill", *TINY, "+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.03"]


def run(places: list[str], *words: str) -> Run:
    config = compose_run([*(words or ["experiment=teacher", *TINY]), *places])
    return Run(config, Paths.of(config))


def test_strict_repeats_are_identical_to_the_bit(places: list[str]) -> None:
    words = [*DISTILL, "method=ce_a_j", "trainer.strict=true", "trainer.threads=1"]
    try:
        made = [run([f"{place}/{i}" for place in places], *words) for i in range(2)]
        records = [ensure(each) for each in made]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["strict"] is True
    assert made[0].weights.read_bytes() == made[1].weights.read_bytes()


def test_float32_is_float32_on_a_gpu_too() -> None:
    """TF32 is torch's default for convolutions; its ten bits would not be what a record calls precision 32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for place in places:
        place.allow_tf32 = True
    build(compose_run(["experiment=teacher", "scale=quick"])["trainer"], where="trainer").apply()
    assert [place.allow_tf32 for place in places] == [False, False]


def test_settings_of_the_gpu_are_there_before_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['run.py']; import runpy; runpy.run_path('run.py', run_name='other'); import os; "
        "sys.exit('torch' in sys.modules or os.environ['CUBLAS_WORKSPACE_CONFIG'] != ':4096:8')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_committed_records_are_valid() -> None:
    """With a digest of their text, so that readers notice an edit, also in those from before there were digests."""
    for folder in ("runs", "verify/runs"):
        for path in (ROOT / "results" / folder).glob("*/*.json"):
            record = read_record(path)
            assert records.faults(record) == [] and "record_sha256" in record, path


BROKEN: dict[str, Any] = {
    "seed": "0",
    "metrics": {"test/accuracy": "high"},
    "status": "fine",
    "id": "teacher",
    "seconds": {"wall": 1},
    "started": "yesterday",
    "upstream": {"teacher": {}},
    "config": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_not_valid(name: str, places: list[str]) -> None:
    good = json.loads(next((ROOT / "results" / "runs" / "teacher").glob("*.json")).read_text())
    assert records.faults(good) == []
    assert records.faults({**good, name: BROKEN[name]})
    assert records.faults({key: value for key, value in good.items() if key != name})


def test_a_finished_record_has_all_its_steps() -> None:
    good = json.loads(next((ROOT / "results" / "runs" / "teacher").glob("*.json")).read_text())
    short = {**good, "planned_steps": good["steps"] + 1}
    assert records.faults({**good, "planned_steps": good["steps"]}) == []
    assert "ended after" in records.faults(short)[0]
    assert records.faults({**short, "status": "diverged"}) == []


def test_verify_finds_what_is_wrong(places: list[str]) -> None:
    """Repeats a whole run; then finds a number, an upstream and a config that were changed by hand, and a spoilt file."""
    made = run(places, *DISTILL, "method=ce")
    good = ensure(made)
    extra = {name: made.config[name] for name in ("trainer", "logger", "gradients")}

    def findings(sample: int = 0) -> list[str]:
        lines = verify(made.paths, sample=sample, seed=0, extra=extra)
        return [line.what for line in lines if isinstance(line, Finding)]

    assert findings(sample=1) == []
    write_record(made.record_path, {**good, "metrics": {**good["metrics"], "test/accuracy": 99.0}})
    (found,) = findings(sample=1)
    assert found.startswith("test/accuracy was 99.0, now it is ")
    write_record(made.record_path, {**good, "config": {**good["config"], "seed": 5}})
    assert "has the id" in findings()[0]
    write_record(made.record_path, {**good, "upstream": {"teacher": {"id": "0" * 12}}})
    assert "upstream teacher is not the run" in findings()[0]
    task = good["config"]["task"]
    for changed, words in (
        ({"_target_": "os.system"}, "os.system is refused"),
        ({"version": 0}, "version of jacobian_distill is 0"),
    ):
        other = {**good["config"], "task": task | changed}
        moved = made.record_path.with_name(f"{run_id(other)}.json")
        write_record(moved, {**good, "config": other, "id": run_id(other)})
        assert words in " ".join(findings())
        moved.unlink()
    write_record(made.record_path, {**good, "command": "python run.py experiment=teacher scale=quick seed=7"})
    assert "its command makes another run today" in findings()[0]
    teacher = run(places, "experiment=teacher", "scale=quick").config
    below = {"teacher": {**teacher, "task": {**teacher["task"], "version": 0}}}
    student = {**good["config"], "upstream": below}
    moved = made.record_path.with_name(f"{run_id(student)}.json")
    write_record(moved, {**good, "config": student, "id": run_id(student)})
    assert "version of teacher is 0" in " ".join(findings())
    moved.unlink()
    write_record(made.record_path, {name: value for name, value in good.items() if name != "upstream"})
    assert "(upstream is missing)" in findings()[0]
    write_record(made.record_path, {**good, "config": {name: x for name, x in good["config"].items() if name != "scale"}})
    assert "not that of a run" in findings()[0]
    made.record_path.write_bytes(made.record_path.read_bytes()[:100])
    assert "can't be read" in findings()[0]


def test_a_changed_term_is_noticed_by_the_runs_that_are_kept(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in ("jacobian_distill", "teacher"):
        shutil.copytree(ROOT / "results" / "verify" / "runs" / kept, tmp_path / "kept" / "runs" / kept)
    monkeypatch.setattr("gradexp.engine.verify.OWN", tmp_path / "kept")
    made = run(places, "experiment=teacher", "scale=quick", "trainer.threads=1", "logger=none")
    extra = {name: made.config[name] for name in ("trainer", "logger", "gradients")}
    assert [str(line).split(":")[1] for line in repeat_own(made.paths, extra)] == [" the same numbers"] * 3
    right = Jacobian.__call__
    monkeypatch.setattr(Jacobian, "__call__", lambda *given: 1.1 * right(*given))
    wrong = [line for line in repeat_own(made.paths, extra) if isinstance(line, Finding)]
    assert any(line.what.startswith("train/loss/jacobian was ") for line in wrong)


def test_a_repeat_has_the_threads_of_its_record(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So has that of the teacher, which may have had others: a generation of one run gets all the cores."""
    made = run(places, *DISTILL, "method=a")
    teacher = Run(
        made.config["upstream"]["teacher"] | {name: made.config[name] for name in HARDWARE if name in made.config}, made.paths
    )
    teacher.config["trainer"] = made.config["trainer"] | {"threads": 2}
    assert [ensure(one)["threads"] for one in (teacher, made)] == [2, 1]
    repeated: list[Any] = []

    def noted(one: Run) -> Any:
        repeated.append((one.config["name"], one.config["trainer"]["threads"]))
        return ensure(one)

    monkeypatch.setattr("gradexp.engine.verify.ensure", noted)
    extra = {name: made.config[name] for name in ("logger", "gradients")} | {
        "trainer": made.config["trainer"] | {"threads": None}
    }
    assert [line for line in verify(made.paths, sample=2, seed=0, extra=extra) if isinstance(line, Finding)] == []
    assert sorted(set(repeated)) == [("jacobian_distill", 1), ("teacher", 2)]


def relabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits whose labels are shifted by one, as another folder might hold them under the same name."""
    original = Digits.splits
    monkeypatch.setattr(
        Digits, "splits", lambda self: {name: Split(s.images, (s.labels + 1) % 10) for name, s in original(self).items()}
    )


@pytest.mark.parametrize("weights", ["there", "lost"])
def test_a_student_of_other_images_than_its_teachers_is_refused(
    weights: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both when the teacher is at hand and when its weights would have to be made again, from the wrong images."""
    first = run(places, *DISTILL, "method=a")
    ensure(first)
    if weights == "lost":
        first.upstream["teacher"].weights.unlink()
    relabelled(monkeypatch)
    second = run(places, *DISTILL, "method=ce_a")
    with pytest.raises(UserError, match=r"the train images of digits are not those of teacher \w{12} .*paths.data=FOLDER"):
        ensure(second)
    assert not second.record_path.exists()
    ensure(run(places, "experiment=teacher", *TINY, "seed=3"))  # stands on nothing: other images are other records' matter


def test_verify_compares_a_runs_images_with_its_upstreams(places: list[str]) -> None:
    made = run(places, *DISTILL, "method=ce_a")
    good = ensure(made)
    write_record(made.record_path, {**good, "data": {**good["data"], "test": "0" * 16}})
    (found,) = [line.what for line in verify(made.paths, sample=0, seed=0, extra={}) if isinstance(line, Finding)]
    assert "used other test images" in found


def test_images_are_compared_split_by_split() -> None:
    first = {"name": "digits", "train": "a", "test": "b"}
    assert differing_split(first, first) is None
    assert differing_split(first, {**first, "train": "c"}) == "train"
    assert differing_split(first, {**first, "test": "c"}) == "test"
    assert differing_split(first, {**first, "name": "cifar10", "train": "c"}) is None
    assert differing_split(first, {**first, "test": "a"}) is None  # held out of the training set
    assert differing_split(first, {"name": "digits", "test": "b"}) is None  # a split that was never opened
    assert differing_split(first, {}) is None


def test_numbers_agree_as_well_as_machines_do() -> None:
    for name in ("test/accuracy", "validation/accuracy", "test/accuracy/0.1"):
        assert alike(name, 60.0, 61.5)
        assert not alike(name, 60.0, 63.0)
    assert alike("test/completeness_error", 3e-8, 9e-8)
    assert not alike("train/loss/jacobian", 0.1, 0.11)
    assert alike("train/loss", [9.0, 1.0], [1.0, 1.01])
    assert not alike("train/loss", [1.0], [1.0, 1.0])
    assert alike("x", None, None)
    assert not alike("x", None, 1.0)


def test_nothing_that_is_loaded_can_execute() -> None:
    """torch.load reads tensors only, everywhere; nothing unpickles."""
    found = 0
    for path in (ROOT / "gradexp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                found += 1
                assert "weights_only=True" in ast.unparse(node), path
    assert found >= 4


def test_a_seal_knows_the_old_file_and_the_new(tmp_path: Path) -> None:
    """Killed between the seal and the file, the old file is still what was written."""
    path = tmp_path / "file"

    def put(content: bytes) -> None:
        files.write_sealed(path, lambda draft: draft.write_bytes(content))

    put(b"old")
    old = path.read_bytes()
    put(b"new")
    assert files.intact(path)
    path.write_bytes(old)
    assert files.intact(path)
    path.write_bytes(b"nwe")
    assert not files.intact(path)


@pytest.mark.parametrize("spoil", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_set_aside(places: list[str], spoil: str, capsys: pytest.CaptureFixture[str]) -> None:
    from gradexp.engine.callbacks import Checkpointer

    whole = ensure(run([f"{place}/whole" for place in places]))
    original = Checkpointer.on_train_batch_end

    def stop(self: Checkpointer, trainer: Any, *_: Any) -> None:
        self.save(trainer)
        raise Stopped

    made = run(places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            ensure(made)
    assert Checkpointer.on_train_batch_end is original
    checkpoint = made.folder / "last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes({"truncated": content[:-7], "flipped": content, "empty": b""}[spoil])
    assert ensure(made)["metrics"] == whole["metrics"]
    assert "is damaged, so it is set aside" in capsys.readouterr().out


def test_damaged_weights_of_a_teacher_are_made_again(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = ensure(run(places, *DISTILL, "method=a"))
    teacher = next(Path(run(places).paths.outputs).rglob("teacher/*/weights.pt"))
    content = bytearray(teacher.read_bytes())
    content[len(content) // 2] ^= 1
    teacher.write_bytes(content)
    second = ensure(run(places, *DISTILL, "method=ce_a"))
    assert second["upstream"] == first["upstream"]
    assert "same numbers as its record" in capsys.readouterr().out


def test_full_disks_and_read_only_folders_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    from gradexp.engine.exits import exit_on_errors

    for number, words in ((errno.ENOSPC, "make room"), (errno.EROFS, "paths.results=FOLDER")):
        with pytest.raises(SystemExit, match=words), exit_on_errors():
            raise OSError(number, "no", "results/x.json")
    with pytest.raises(UserError), pytest.MonkeyPatch.context() as patch, exit_on_errors():
        patch.setenv("HYDRA_FULL_ERROR", "1")
        raise UserError("no")
