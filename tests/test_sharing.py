"""Several processes, outputs folders and machines that share results: drafts and locks."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gradexp.base import files
from gradexp.engine import build, ensure
from gradexp.engine.exits import die_with_parent, exit_on_errors
from gradexp.engine.run import Paths, Run
from gradexp.engine.task import Result, Task, Upstream


class Slow(Task):
    """Takes a second, and notes each time that it is done."""

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        with (run.paths.results / "times").open("a") as file:
            file.write("x")
        time.sleep(1)
        return Result({"test/accuracy": 50.0})


@pytest.fixture(autouse=True)
def _slow_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.KINDS, "task", build.Kind("a task", ("test_sharing.Slow",)))


def slow(tmp_path: Path, outputs: str = "outputs") -> Run:
    config = {
        "name": "slow",
        "seed": 0,
        "scale": {"name": "quick"},
        "upstream": {},
        "task": {"_target_": "test_sharing.Slow"},
        "paths": {"data": "data", "results": str(tmp_path / "results"), "outputs": str(tmp_path / outputs)},
    }
    return Run(config, Paths.of(config))


def draft(path: Path, *, age: float = 0.0) -> Path:
    made = files.draft_of(path)
    made.write_text("half")
    os.utime(made, (time.time() - age,) * 2)
    return made


@pytest.mark.parametrize(("age", "stays"), [(0.0, True), (6e5, False)])
def test_only_drafts_that_nobody_writes_are_removed(age: float, stays: bool, tmp_path: Path) -> None:
    """Two runs may write one file of the cache at the same time."""
    path = tmp_path / "record.json"
    made = draft(path, age=age)
    files.write_sealed(path, b"content")
    assert made.exists() is stays
    assert path.read_bytes() == b"content"


def test_a_finished_run_leaves_no_drafts_of_killed_attempts(tmp_path: Path) -> None:
    run = slow(tmp_path)
    left = [draft(run.record_path), draft(run.checkpoint)]
    ensure.ensure(run)
    assert not any(path.exists() for path in left)


def test_drafts_of_names_as_long_as_a_disk_takes_are_made_and_removed(tmp_path: Path) -> None:
    for name in ("n" * 248 + "[1]", "ä" * 124):
        made = draft(tmp_path / name, age=6e5)
        files.remove_drafts(tmp_path / name)
        assert not made.exists()


def test_two_drafts_of_one_file_have_two_names(tmp_path: Path) -> None:
    assert files.draft_of(tmp_path / "a") != files.draft_of(tmp_path / "a")


def _ensure(run: Run, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(ensure.ensure(run))


def test_outputs_folders_that_share_results_do_a_run_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    runs = [slow(tmp_path, f"outputs{number}") for number in range(3)]
    workers = [context.Process(target=_ensure, args=(run, barrier, results)) for run in runs]
    for worker in workers:
        worker.start()
    records = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert records[0] == records[1] == records[2]
    assert (tmp_path / "results" / "times").read_text() == "x"
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize("which", ["outputs", "results"])
def test_who_waits_names_the_holder_again_and_again(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock beside the outputs, and the one beside the record where the outputs are others."""
    monkeypatch.setattr(ensure, "WAITING_EVERY", 0.2)
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with ensure._locked(slow(tmp_path)):
            ready.set()
            time.sleep(2)

    holder = context.Process(target=hold)
    holder.start()
    assert ready.wait(20)
    ensure.ensure(slow(tmp_path, "outputs" if which == "outputs" else "others"))
    holder.join()
    assert capsys.readouterr().out.count(f"waiting for process {holder.pid} on host ") > 2


def test_a_folder_in_the_place_of_a_lock_is_one_line(tmp_path: Path) -> None:
    run = slow(tmp_path)
    (run.paths.outputs / "locks" / f"{run.id}.lock").mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"error: .*{run.id}\.lock can't be written: a folder is where"), exit_on_errors():
        ensure.ensure(run)


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_ends_if_the_one_that_started_it_is_gone(alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that one is the first process of a container, whose number is that of the process that adopts orphans."""
    child = multiprocessing.get_context("fork").Process(target=_die_with, args=(os.getpid() if alive else 0,))
    child.start()
    child.join()
    assert child.exitcode == (0 if alive else 1)


def _die_with(parent: int) -> None:
    os.getppid = lambda: parent
    die_with_parent()
