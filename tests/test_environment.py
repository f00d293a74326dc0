"""What a command asks of its surroundings: git, W&B, variables of schedulers, the working directory, signals, the terminal."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from hydra import compose, initialize_config_dir
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gradexp.base.errors import Stopped, UserError
from gradexp.engine import exits, loggers, origin
from gradexp.engine import run as run_module
from gradexp.engine.compose import CONF, compose_run
from gradexp.engine.run import ROOT, Paths, Run

QUICK = ["experiment=jacobian_distill", "scale=quick", "scale.width=0.03", "method=ce", "data.per_class=1", "optim.passes=2"]
QUICK += ["trainer.threads=1"]


# --- git --------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "file").write_text("content")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "message")
    return folder.resolve()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(origin.LOADED, raising=False)
    origin._note.cache_clear()


def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "ROOT", tmp_path)


def inside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository(tmp_path / "outer") / "inner").mkdir()
    monkeypatch.setattr(origin, "ROOT", tmp_path.resolve() / "outer" / "inner")


def without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "ROOT", repository(tmp_path / "ours"))
    monkeypatch.setenv("PATH", str(tmp_path))


def another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = repository(tmp_path / "ours")
    try:
        os.chown(ours, 12345, -1)
        os.chown(ours / ".git", 12345, -1)
    except PermissionError:
        pytest.skip("only root gives files away")
    monkeypatch.setenv("HOME", str(tmp_path))  # whose configuration may trust every folder
    monkeypatch.setattr(origin, "ROOT", ours)


def without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q")
    monkeypatch.setattr(origin, "ROOT", (tmp_path / "new").resolve())


@pytest.mark.parametrize("where", [nowhere, inside_another, without_git, another_users, without_a_commit])
def test_where_git_does_not_know_the_commit_one_line_is_printed(
    where: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where(tmp_path, monkeypatch)
    assert origin.git_state() == origin.git_state() == {"commit": None, "dirty": None}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("records will name no commit")


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_variables_of_git_name_no_other_repository(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = repository(tmp_path / "ours"), repository(tmp_path / "other")
    monkeypatch.setattr(origin, "ROOT", ours)
    monkeypatch.setenv(variable, str(other / ".git" if variable != "GIT_WORK_TREE" else other))
    assert origin.git_state() == {"commit": git(ours, "rev-parse", "HEAD"), "dirty": False}


def test_code_that_was_changed_when_it_was_loaded_is_not_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is restored before the first record is written, by a process that has the changed code in memory."""
    ours = repository(tmp_path / "ours")
    monkeypatch.setattr(origin, "ROOT", ours)
    monkeypatch.setenv(origin.LOADED, "")  # so that it is restored
    monkeypatch.delenv(origin.LOADED)
    (ours / "file").write_text("changed")
    origin.git_state()
    (ours / "file").write_text("content")
    assert git(ours, "status", "--porcelain") == ""
    assert origin.git_state()["dirty"] is True


# --- W&B --------------------------------------------------------------------------------------------------

KEY = "0123456789" * 4


def training(places: list[str], *words: str) -> Run:
    config = compose_run([*QUICK, *words, *places])
    return Run(config, Paths.of(config))


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it keeps what it has read of the environment
    return tmp_path


def fake_loggers(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[bool]:
    """Replaces W&B's logger. The list gets, for each that is made, whether it is offline."""
    made: list[bool] = []

    class Fake:
        def __init__(self, offline: bool) -> None:
            made.append(offline)
            self.offline = offline

        @property
        def experiment(self) -> None:
            if error and not self.offline:
                raise error

    monkeypatch.setattr(loggers, "_wandb_logger", lambda *_, offline: Fake(offline))
    return made


SERVERS = [("api.wandb.ai", None, False), ("wandb.example.org", None, True)]
SERVERS += [("wandb.example.org", "https://wandb.example.org", False), ("api.wandb.ai", "https://wandb.example.org", True)]


@pytest.mark.parametrize(("host", "server", "offline"), SERVERS)
def test_w_and_b_finds_the_key_that_netrc_has_for_its_server(
    host: str, server: str | None, offline: bool, wandb_home: Path, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (wandb_home / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    made = fake_loggers(monkeypatch, None)
    loggers.make_logger(training(places, "logger=wandb"))
    assert made == [offline]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_the_mode_of_w_and_b_is_kept(mode: str, wandb_home: Path, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    made = fake_loggers(monkeypatch, None)
    loggers.make_logger(training(places, "logger=wandb"))
    assert made == {"disabled": [], "offline": [True]}[mode]


def test_w_and_b_out_of_reach_is_tried_once(
    wandb_home: Path, places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "online")
    made = fake_loggers(monkeypatch, TimeoutError("no answer"))
    for seed in range(3):
        loggers.make_logger(training(places, "logger=wandb", f"seed={seed}"))
    assert made == [False, True, True, True]
    assert capsys.readouterr().out.count("logged offline") == 1


def test_a_stale_key_without_network_costs_seconds(tmp_path: Path, wandb_home: Path, places: list[str]) -> None:
    """The run is logged offline; what is stored names neither the command line nor folders."""
    environment = os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # wandb reads them at its import
    words = [sys.executable, "run.py", *QUICK, "logger=wandb", "logger.group=some_group", *places]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("logged offline") == 1
    stored = [file for file in tmp_path.rglob("*") if file.is_file() and "wandb" in str(file.relative_to(tmp_path))]
    (run,) = [file for file in stored if file.suffix == ".wandb"]
    assert b"some_group" in run.read_bytes()
    for file in stored:
        if "offline-run" in str(file) and "logs" not in file.parts:
            for private in (str(ROOT), str(tmp_path), "optim.passes=2"):
                assert private.encode() not in file.read_bytes(), (file, private)


def test_variables_of_a_scheduler_do_not_silence_a_plain_run(
    tmp_path: Path, run_py: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    done = run_py(*QUICK, "logger=csv")
    assert done.returncode == 0, done.stderr
    (curves,) = tmp_path.rglob("metrics.csv")
    assert "train/loss" in curves.read_text()


# --- the working directory --------------------------------------------------------------------------------


def outside(tmp_path: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """The command in a folder of its own, which must stay empty."""
    empty = tmp_path / "empty"
    empty.mkdir()
    places = [f"paths.results={tmp_path}/results", f"paths.outputs={tmp_path}/outputs"]
    done = subprocess.run([*command, *QUICK, "logger=none", *places], cwd=empty, capture_output=True, text=True)
    assert list(empty.iterdir()) == []
    return done


@pytest.mark.parametrize("script", ["run.py", "a link to it"])
def test_a_command_may_be_typed_in_any_folder(script: str, tmp_path: Path) -> None:
    path = ROOT / "run.py"
    if script == "a link to it":
        path = tmp_path / "link.py"
        path.symlink_to(ROOT / "run.py")
    done = outside(tmp_path, sys.executable, str(path))
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("results/runs/*/*.json"))) == 1
    assert not list(tmp_path.rglob("*.log"))


def test_relative_folders_start_at_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Hydra too."""
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["experiment=teacher"], return_hydra_config=True)
        assert config.hydra.run.dir == str(ROOT / "outputs" / "hydra") == str(Path(config.hydra.sweep.dir).parent)


# --- interrupts -------------------------------------------------------------------------------------------


def interruptible() -> None:
    """Background jobs of shells ignore SIGINT, and so do their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def started(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=interruptible,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


ENDLESS = [
    "scale=quick",
    "scale.width=0.04",
    "optim.passes=100000",
    "trainer.threads=1",
    "trainer.checkpoint_every=0",
    "logger=none",
]


def test_ctrl_c_leaves_a_checkpoint_and_dies_of_it(tmp_path: Path, places: list[str]) -> None:
    process = started("run.py", "experiment=teacher", *ENDLESS, *places)
    wait_for(lambda: list(tmp_path.rglob("last.ckpt")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert output.splitlines() == ["stopped by SIGINT; the same command resumes from the last checkpoint"]


SCRIPTS = {
    "make_table": ["scripts/make_table.py", "2.1", "--scale", "quick", "--workers", "2"],
    "make_figure": ["scripts/make_figure.py", "2.1", "--scale", "quick", "--workers", "1"],
}


@pytest.mark.parametrize("to", ["parent", "group"])
def test_ctrl_c_ends_a_table_with_its_runs(to: str, tmp_path: Path, places: list[str]) -> None:
    process = started(*SCRIPTS["make_table"], "--set", *places, "trainer.checkpoint_every=0", "logger=none")
    wait_for(lambda: list(tmp_path.rglob("last.ckpt")))
    os.kill(process.pid, signal.SIGINT) if to == "parent" else os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in output
    assert output.splitlines()[-1] == "stopped by SIGINT; the same command goes on from what is finished"
    logs = [log.read_text() for log in tmp_path.rglob("log.txt")]
    assert logs
    assert all("Traceback" not in log for log in logs)


def test_ctrl_c_outside_a_training_is_one_line() -> None:
    """While modules are imported, or records are read."""
    code = "from gradexp.engine import exits; import time; print('ready', flush=True); time.sleep(60)"
    process = started("-c", code)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert output == f"{exits.INTERRUPTED}\n"


def test_how_a_process_ends_depends_on_the_signal() -> None:
    with pytest.raises(SystemExit, match="143"), exits.exit_on_errors():
        raise Stopped("stopped", signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt), exits.exit_on_errors():
        raise Stopped("stopped", signal.SIGINT)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory.")],
)
def test_no_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=r"error: the memory is used up; .*WORKERS=1"), exits.exit_on_errors():
        raise error
    with pytest.raises(RuntimeError, match="another"), exits.exit_on_errors():
        raise RuntimeError("another")


# --- the terminal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_is_not_utf_8(variables: dict[str, str]) -> None:
    code = "from gradexp.engine import exits; print('\\u03c3')"
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").strip()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("output", ["full", "closed", "broken"])
def test_output_that_can_not_be_written_does_not_lose_the_work(output: str, tmp_path: Path, places: list[str]) -> None:
    """The record is written; the exit code is not zero, and no traceback is printed."""
    redirect = {"full": "> /dev/full", "closed": ">&-", "broken": "| true"}[output]
    words = " ".join([sys.executable, "run.py", *QUICK, "logger=none", *places])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} {redirect}"], cwd=ROOT, capture_output=True, text=True)
    assert len(list(tmp_path.rglob("results/runs/*/*.json"))) == 1
    assert (done.returncode == 0) is (output == "closed")  # without a standard output there is nothing to lose
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def unwritable(folder: Path) -> bool:
    probe = folder / "probe"
    try:
        probe.touch()
    except OSError:
        return True
    probe.unlink()
    return False


def test_a_checkout_that_is_read_only(tmp_path: Path) -> None:
    """With its outputs elsewhere. Root may write anywhere, so this needs a mount."""
    copy = tmp_path / "copy"
    for name in ("gradexp", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", copy)
    mount = ["mount", "--bind", str(copy), str(copy)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(copy)], check=True, capture_output=True)
        assert unwritable(copy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(copy))
            done = outside(tmp_path, sys.executable, str(copy / "run.py"))
    finally:
        subprocess.run(["umount", str(copy)], check=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_default_data_folder_may_be_absent_however_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes of one training get it as an absolute path, and `quick` needs no data."""
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    paths = {"results": "results", "outputs": "outputs"}
    for data in ("data", str(tmp_path / "data"), ""):
        assert Paths.of({"paths": {**paths, "data": data}}).data == tmp_path / "data"
    with pytest.raises(UserError, match="there is no such folder"):
        Paths.of({"paths": {**paths, "data": "elsewhere"}})


# --- a machine without network ----------------------------------------------------------------------------


def requirements(package: str) -> set[str]:
    """What an installed package needs here, without its extras; names as in wheels."""
    parsed = map(Requirement, metadata.requires(package) or [])
    return {canonicalize_name(each.name) for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})}


def test_the_list_of_packages_for_a_machine_without_network_is_closed() -> None:
    """Each one's requirements are in docs/gpu_machine.txt, or come with the machine's torch, torchvision and NumPy."""
    lines = (ROOT / "docs" / "gpu_machine.txt").read_text().splitlines()
    listed = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    present, left = set(), ["torch", "torchvision", "numpy"]
    while left:
        if (name := left.pop()) not in present:
            present.add(name)
            left += requirements(name) if not name.startswith(("nvidia", "cuda", "triton")) else ()
    lacking = {name: absent for name in sorted(listed) if (absent := requirements(name) - listed - present)}
    assert not lacking
    pinned = {Requirement(line).name for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    assert listed <= {canonicalize_name(name) for name in pinned}
