"""What the scripts behind make share, and that each has its help."""

import runpy
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from gradexp.base.errors import MissingError, UserError
from gradexp.engine.launchers import last_line
from gradexp.engine.run import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import common
import verify

COMMANDS = [file for file in sorted((ROOT / "scripts").glob("*.py")) if 'if __name__ == "__main__":' in file.read_text()]


@pytest.mark.parametrize("word", ["optim.passes=1", "seed=3", "+data.crop=0", "scale=paper", "method=ce"])
def test_what_decides_numbers_can_not_be_set_for_all_runs(word: str) -> None:
    """It would train runs that no cell names."""
    with pytest.raises(UserError, match=r"python run\.py"):
        common.shared("quick", [word])


def test_hardware_and_places_can(tmp_path: Path) -> None:
    config = common.shared("quick", ["trainer.threads=1", f"paths.results={tmp_path}", "logger=csv"])
    assert (config["trainer"]["threads"], config["paths"]["results"]) == (1, str(tmp_path))


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_less_than_one_worker_is_refused(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_table.py", "2.1", "--scale", "quick", "--workers", workers])
    with pytest.raises(SystemExit, match=f"WORKERS={workers}"):
        common.make_all("table", lambda *_: None, None)


def test_a_negative_sample_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["verify.py", "--sample", "-3"])
    with pytest.raises(UserError, match="--sample -3: expected a number of records"):
        verify.main()


def test_a_killed_run_is_said_to_be_killed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_line(log, 2) == "it ended with exit code 2 and printed nothing"
    log.write_text("step 3/9\n")
    assert last_line(log, 1) == "step 3/9"
    assert last_line(log, -signal.SIGKILL) == "killed by signal 9; its last output: step 3/9"


@pytest.mark.parametrize(("error", "code"), [(MissingError, None), (UserError, 1)])
def test_rendering_fails_where_something_is_damaged_and_not_where_runs_are_missing(
    error: type[UserError], code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(*_: Any) -> None:
        raise error("no")

    monkeypatch.setattr(common.specs, "at_scale", lambda kind, scale: {"2.1": common.specs.load(kind, "2.1")})
    monkeypatch.setattr(sys, "argv", ["make_figure.py", "--scale", "quick", "--render-only"])
    with pytest.raises(SystemExit) if code else nullcontext() as ended:
        common.make_all("figure", make, None)
    assert ended is None or ended.value.code == code
    assert capsys.readouterr().out == "no\n"


def test_two_processes_that_write_one_log_leave_whole_lines(tmp_path: Path) -> None:
    """The second one begins the log anew; the first goes on behind it."""
    log, done = tmp_path / "log.txt", tmp_path / "done"
    script = f"""
import time
from pathlib import Path
from types import SimpleNamespace
from gradexp.engine import launchers
launchers.ensure = lambda *_, **__: None
launchers.plan = lambda *_: SimpleNamespace(config={{"objective": None}})
def wait(*_):
    print("first, before", flush=True)
    while not Path({str(done)!r}).exists():
        time.sleep(0.01)
    print("first, after", flush=True)
if "{{part}}" == "first":
    launchers.print_summary = wait
else:
    launchers.print_summary = lambda *_: print("second")
launchers.Work((), Path({str(log)!r}))()
"""
    first = subprocess.Popen([sys.executable, "-c", script.replace("{part}", "first")], cwd=ROOT)
    while not log.exists() or "before" not in log.read_text():
        time.sleep(0.01)
        assert first.poll() is None
    subprocess.run([sys.executable, "-c", script.replace("{part}", "second")], cwd=ROOT, check=True)
    done.touch()
    assert first.wait() == 0
    assert log.read_text() == "second\nfirst, after\n"


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_every_script_says_what_it_does(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does nothing else."""
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {file.name}")
