"""A record proves itself: whatever of it was changed, copied or replaced is refused by every reader, in one line."""

import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradexp
from gradexp.base.errors import UserError
from gradexp.engine import origin
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.known import find_record
from gradexp.engine.origin import SOURCES
from gradexp.engine.record import curves_path, read_arrays, read_record, write_record
from gradexp.engine.run import ROOT, Paths, Run
from gradexp.engine.verify import Finding, examine, verify
from gradexp.report.costs import History

FILES = sorted((ROOT / "results" / "runs").glob("*/*.json"))
STUDENT, OTHER = [file for file in FILES if file.parent.name == "jacobian_distill" and read_record(file)["upstream"]][:2]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record as it is written today, in a results folder of its own."""
    path = tmp_path / "results" / "runs" / STUDENT.parent.name / STUDENT.name
    write_record(path, read_record(STUDENT))
    return path


def refused(path: Path, words: str) -> None:
    """Every reader refuses the record in one line that names the file and what to do."""
    results = path.parents[2]
    readers: list[Callable[[], Any]] = [
        lambda: read_record(path),
        lambda: gradexp.records(results=results),
    ]
    for read in readers:
        with pytest.raises(UserError, match=words) as error:
            read()
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        assert "restore it with git" in str(error.value)
    assert not History.of(Paths(Path("data"), results, results.parent / "outputs")).samples  # it is left out of estimates
    (line,) = [
        line for line in verify(Paths(Path("data"), results, results), sample=0, seed=0, extra={}) if isinstance(line, Finding)
    ]
    assert line.record == path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edits a record in an editor: its digest stays."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, sort_keys=True, indent=2) + "\n")


def test_a_record_in_another_records_place_is_refused(record: Path) -> None:
    shutil.copy(OTHER, record)
    refused(record, f"its id is {OTHER.stem}, which is not the name of its file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["config"].update(seed=5), "its config has the id"),
        (lambda content: content["config"]["data"].update(per_class=99), "its config has the id"),
        (lambda content: content["config"]["upstream"]["teacher"]["optim"].update(passes=99), "its config has the id"),
        (lambda content: content.update(id="0" * 12), "its id is 000000000000"),
        (lambda content: content.update(seed=5), r"its seed is 5, and \d in its config"),
        (lambda content: content.update(scale="paper"), "its scale is paper, and cpu in its config"),
        (lambda content: content.update(experiment="teacher"), "its experiment is teacher"),
        (lambda content: content.update(config={}), "its config is not that of a run"),
        (lambda content: content["config"].pop("task"), "its config is not that of a run"),
        (lambda content: content["config"].update(task="x"), "its config is not that of a run"),
        (lambda content: content["config"]["task"].update(_target_=None), "task._target_=None should be a valid string"),
        (lambda content: content["config"]["model"].update(_target_=["a"]), "model._target_ is no text"),
        (lambda content: content["config"]["method"].update(module=7), "method.module._target_ is no text"),
        (lambda content: content["config"]["upstream"]["teacher"].pop("task"), "its config is not that of a run"),
        (lambda content: content["config"]["upstream"]["teacher"].pop("name"), "its config is not that of a run"),
        (lambda content: content.update(command='python "'), "No closing quotation"),
        (lambda content: content.update(command="python run.py \x1b[2J"), "no command"),
        (
            lambda content: content["upstream"]["teacher"].update(data={"name": "cifar100", "train": "0"}),
            "used other train images",
        ),
    ],
)
def test_a_record_agrees_with_its_config(record: Path, change: Any, words: str) -> None:
    edit(record, change)
    refused(record, words)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["metrics"].update({"test/accuracy": 99.0}),
        lambda content: content["metrics"].popitem(),
        lambda content: content.update(status="diverged"),
        lambda content: content["git"].update(dirty=False, commit="0" * 40),
        lambda content: content["config"]["trainer"].update(threads=64),
        lambda content: content.update(sources=SOURCES) or content.pop("record_sha256"),
    ],
)
def test_what_is_edited_by_hand_is_noticed(record: Path, change: Any) -> None:
    edit(record, change)
    refused(record, "it was changed since it was written")


def test_a_record_in_another_folder_is_refused(record: Path) -> None:
    moved = record.parents[1] / "teacher" / record.name
    moved.parent.mkdir()
    record.rename(moved)
    refused(moved, "which is not the name of its folder")


def test_curves_of_another_run_are_refused(record: Path) -> None:
    write_record(record, read_record(record) | {"metrics": {"test/accuracy": 1.0, "curve": [0.1] * 20000}})
    assert read_record(record)["metrics"]["curve"] == [0.1] * 20000
    curves_path(record).write_bytes(gzip.compress(json.dumps({"test/accuracy": 99.0, "curve": [0.2]}).encode()))
    record.touch()
    refused(record, "is not the file that was written with it")


PATHS = ["../x", "../../../escaped", "/etc/passwd", "a/b", "..", "", ".hidden", "a\\b", "a\nb"]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
@pytest.mark.parametrize(
    "put",
    [
        lambda content, path: content.update(curves_file=path),
        lambda content, path: content["upstream"]["teacher"].update(experiment=path),
        lambda content, path: content["upstream"]["teacher"].update(id=path),
        lambda content, path: content.update(product={"file": path, "sha256": "0" * 64}),
        lambda content, path: content.update(id=path),
        lambda content, path: content.update(experiment=path),
    ],
    ids=["curves", "upstream", "upstream id", "product", "id", "experiment"],
)
def test_no_path_of_a_record_is_followed(record: Path, path: str, put: Any) -> None:
    edit(record, lambda content: put(content, path))
    with pytest.raises(UserError, match="should") as error:
        read_record(record)
    assert "\n" not in str(error.value)


def test_curves_are_read_from_the_file_beside_the_record_only(record: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for key in ("record_sha256", "curves_sha256", "sources"):  # as in a record of before digests
            content.pop(key, None)
        content["curves_file"] = f"{OTHER.stem}.curves.json.gz"

    edit(record, change)
    refused(record, "its curves_file is")


@pytest.mark.parametrize("name", ["../../../escaped", "'a/b'", "'..'", "/x", "'.x'"])
def test_the_name_of_a_run_is_no_path(name: str, places: list[str]) -> None:
    with pytest.raises(UserError, match="should be a name"):
        compose_run(["experiment=teacher", "scale=quick", f"name={name}", *places])
    with pytest.raises(UserError, match="should be a name"):
        Run({"name": "../x", "scale": {"name": "quick"}, "upstream": {}}, Paths(Path("a"), Path("b"), Path("c"))).record()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"metrics": {}}',
        b'{"metrics": {"a": 1.0}}',
        b"\xff\xfe",
        b"{",
        b"[" * 100000,
        b'{"metrics": 3}',
        b"NaN",
    ],
    ids=lambda content: ascii(content[:12]),
)
def test_what_is_no_record_is_refused(record: Path, content: bytes) -> None:
    record.write_bytes(content)
    refused(record, "can't be read")


def test_a_folder_in_a_records_place_is_refused(record: Path) -> None:
    record.unlink()
    record.mkdir()
    refused(record, "can't be read")


def test_committed_records_are_what_they_state() -> None:
    """They were written before records had digests of themselves, and are valid without."""
    assert {file.stem for file in FILES} <= set(gradexp.records().index)


def test_arrays_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    source = next(file for file in FILES if "arrays" in read_record(file))
    path = tmp_path / source.parent.name / source.name
    path.parent.mkdir()
    shutil.copy(source, path)
    for content in (b"", b"PK", b"no arrays", next(other for other in FILES if other != source).read_bytes()):
        path.with_suffix(".npz").write_bytes(content)
        with pytest.raises(UserError, match="is not what"):
            read_arrays(path)


def repository(folder: Path) -> Callable[[str], str]:
    """A git repository with one committed file; a function that calls git in it."""

    def git(words: str) -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words.split()]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    folder.mkdir(exist_ok=True)
    git("init -q")
    (folder / "term.py").write_text("weight = 1\n")
    git("add .")
    git("commit -qm first")
    return git


def test_a_process_never_claims_clean_code_that_was_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A term is edited, a table starts, and the file is restored while it runs."""
    git = repository(tmp_path)
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    commit, term = git("rev-parse HEAD").strip(), tmp_path / "term.py"

    def state(*, fresh: bool) -> dict[str, Any]:
        """fresh: as of a process that starts now; otherwise of one that was forked from the process before."""
        if fresh:
            monkeypatch.delenv(origin.LOADED, raising=False)
        return origin.git_state()

    assert state(fresh=True) == {"commit": commit, "dirty": False}
    term.write_text("weight = 2\n")
    assert state(fresh=False)["dirty"]  # edited after the code was loaded
    edited = state(fresh=True)
    assert edited["dirty"]
    term.write_text("weight = 1\n")
    assert state(fresh=False) == edited
    assert state(fresh=True) == {"commit": commit, "dirty": False}
    term.write_text("weight = 3\n")
    assert state(fresh=True)["changes"] != edited["changes"]
    term.write_text("weight = 1\n")
    (tmp_path / "new.py").write_text("x")
    new = state(fresh=True)
    assert new["dirty"]
    (tmp_path / "new.py").write_text("y")
    assert state(fresh=True)["changes"] != new["changes"]
    (tmp_path / "new.py").unlink()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("{}")
    assert state(fresh=True) == {"commit": commit, "dirty": False}
    git("commit -q --allow-empty -m second")
    assert state(fresh=False)["dirty"]


def test_what_is_no_file_of_the_code_has_a_state_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of an editor, which is a link to nowhere; a folder of data behind a link; a repository inside."""
    git = repository(tmp_path)
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    (tmp_path / ".#term.py").symlink_to("user@host.1")
    (tmp_path / "data").symlink_to("/")
    repository(tmp_path / "inside")
    monkeypatch.delenv(origin.LOADED, raising=False)
    state = origin.git_state()
    assert (state["commit"], state["dirty"]) == (git("rev-parse HEAD").strip(), True)


def test_files_that_were_made_again_are_listed(record: Path, tmp_path: Path) -> None:
    weights = tmp_path / "outputs" / "runs" / record.parent.name / record.stem / "weights.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"others")
    signature = {"run": record.stem, "sha256": hashlib.sha256(b"others").hexdigest()}
    weights.with_name("weights.pt.run.json").write_text(json.dumps(signature))
    write_record(record, read_record(record) | {"product": {"file": "weights.pt", "sha256": "0" * 64}})
    lines = verify(Paths(Path("data"), record.parents[2], tmp_path / "outputs"), sample=0, seed=0, extra={})
    assert any(str(line).startswith("the files of 1 runs were made again") for line in lines)


def test_records_of_other_sources_are_listed(record: Path) -> None:
    def information() -> str:
        paths = Paths(Path("data"), record.parents[2], record.parents[3])
        return "\n".join(str(line) for line in verify(paths, sample=0, seed=0, extra={}) if not isinstance(line, Finding))

    write_record(record, {key: value for key, value in read_record(record).items() if key != "sources"})
    assert "1 records do not state by which sources" in information()
    write_record(record, read_record(record) | {"sources": SOURCES})
    assert "sources" not in information()
    write_record(record, read_record(record) | {"sources": SOURCES | {"terms": "0" * 12, "layers": "1" * 12}})
    assert f"1 records were computed by other sources of layers, terms than today's: {record.stem}" in information()
    assert "1 records are not repeated: only those at scale=quick" in information()


def test_every_package_that_computes_has_a_digest() -> None:
    empty = hashlib.sha256().hexdigest()[:12]
    assert len({*SOURCES.values(), empty}) == len(SOURCES) + 1
    packages = {file.name for file in (ROOT / "gradexp").iterdir() if not file.name.startswith("_")}
    assert SOURCES.keys() == packages - {"base", "report"}


def test_a_package_that_was_moved_to_another_folder_has_the_same_digest(tmp_path: Path) -> None:
    folders = [tmp_path / place / "mine" for place in ("here", "there")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "terms.py").write_text("weight = 1\n")
    assert len({origin._digest(folder, folder) for folder in folders}) == 1


TINY = ["scale=quick", "scale.width=0.04", "optim.passes=2", "data.per_class=3", "trainer.threads=1", "logger=none"]


def tiny(places: list[str], *words: str) -> Run:
    config = compose_run(["experiment=jacobian_distill", *TINY, "+upstream.teacher.optim.passes=1", *words, *places])
    return Run(config, Paths.of(config))


def test_a_new_record_proves_itself_and_its_upstream(places: list[str]) -> None:
    run = tiny(places, "method=a")
    stored = ensure(run)
    assert set(stored) >= {"record_sha256", "sources", "product"}
    assert stored["upstream"]["teacher"]["data"]["train"]
    assert find_record(run.id, run.paths.results) == run.record_path
    assert list(examine(run.record_path, run.paths.outputs)) == []


@pytest.mark.parametrize("name", ["../x.pth", "/etc/passwd", "a/b"])
def test_published_weights_are_read_from_their_folder_only(name: str) -> None:
    node = {"_target_": "gradexp.tasks.pretrained.Pretrained", "version": 1, "file": name}
    with pytest.raises(UserError, match="should be a name"):
        build(node, where="task")


@pytest.mark.parametrize("signed", [True, False])
def test_the_weights_of_another_teacher_are_not_used(
    places: list[str], signed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's weights, with their seal and without or with the file that names their run."""
    first, other = tiny(places, "method=a"), tiny(places, "method=a", "upstream.teacher.seed=7")
    expected = ensure(first)["upstream"]
    ensure(other)
    mine, theirs = (run.upstream["teacher"].folder for run in (first, other))
    for file in theirs.glob("weights.pt*"):
        if signed or not file.name.endswith(".json"):
            shutil.copy(file, mine / file.name)
    assert ensure(tiny(places, "method=ce_a"))["upstream"] == expected
    assert "replaced by those of another run" in capsys.readouterr().out
