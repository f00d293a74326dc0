"""Many runs at once: generations, leases, signals, clusters, sweepers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradexp.base.errors import Stopped, UserError
from gradexp.engine import launchers
from gradexp.engine.callbacks import Checkpointer
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.launchers import Local, Work, generations, make_launcher, run_all, visible_gpus
from gradexp.engine.record import objective
from gradexp.engine.run import ROOT, Paths, Run, run_id

TINY = ["scale=quick", "scale.width=0.04", "optim.passes=2", "data.per_class=3", "trainer.threads=1", "logger=none"]


def paths_of(places: list[str]) -> Paths:
    return Paths.of(compose_run(["experiment=teacher", *places]))


def test_upstream_runs_come_in_an_earlier_generation_and_once(places: list[str]) -> None:
    """ROAR stands on maps, which stand on a classifier; a student and its teacher come along."""
    runs = [plan(["experiment=roar", "scale=quick", f"seed={seed}"], places) for seed in (0, 1)]
    runs += [plan(["experiment=jacobian_distill", "scale=quick"], places)]
    found = generations(runs)
    place = {run_id(run.config): number for number, stage in enumerate(found) for run in stage}
    assert len(place) == sum(map(len, found))

    def check(run: Any) -> None:
        for below in run.upstream.values():
            assert place[run_id(below.config)] < place[run_id(run.config)]
            check(below)

    for run in runs:
        check(run)
    assert len(found) == 3


def test_a_file_that_was_deleted_is_made_before_the_runs_that_would_wait_for_it(places: list[str]) -> None:
    """By a stage of its own, which the runs that need it share; a file that is there needs none."""
    words = ["experiment=jacobian_distill", *TINY, "+upstream.teacher.optim.passes=2"]
    students = [plan([*words, f"seed={seed}"], places) for seed in (0, 1)]
    teacher = students[0].upstream["teacher"]
    ensure(teacher)
    assert generations(students) == [students]
    (teacher.folder / "weights.pt").unlink()
    assert generations(students) == [[teacher], students]
    works: list[Work] = []

    class Noting(Local):
        def do(self, given: Sequence[Work], workers: int) -> Iterator[tuple[int, int]]:
            works.extend(given)
            yield from super().do(given, workers)

    assert run_all(students, workers=2, extra=places, launcher=Noting()) == []
    assert [work.product for work in works] == [True, False, False]
    assert "rebuilt teacher" in (teacher.folder / "log.txt").read_text()
    assert all("rebuilt" not in (student.folder / "log.txt").read_text() for student in students)


class Lease:
    """Notes which GPU it was given, and when."""

    def __init__(self, folder: Path, number: int) -> None:
        self.file = folder / f"{number}.json"

    def __call__(self, threads: int) -> None:
        begun = time.monotonic()
        time.sleep(0.2)
        self.file.write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], begun, time.monotonic()]))


def test_a_gpu_is_leased_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    codes = list(Local().do([Lease(tmp_path, number) for number in range(5)], 4))  # type: ignore[misc]
    assert sorted(codes) == [(number, 0) for number in range(5)]
    leases = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(leases) == 5
    assert {gpu for gpu, *_ in leases} == {"3", "5"}
    for gpu in ("3", "5"):
        times = sorted((begun, ended) for name, begun, ended in leases if name == gpu)
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(times))


class Share:
    """Notes how many threads it was given."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, threads: int) -> None:
        self.file.write_text(str(threads))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system can't confine a process to some cores")
@pytest.mark.parametrize("runs", [1, 2])
def test_the_cores_that_the_process_may_use_are_shared_out(tmp_path: Path, runs: int) -> None:
    """A SLURM job has a few of its machine's cores."""
    mine = sorted(os.sched_getaffinity(0))
    for cores in {1, len(mine)}:
        os.sched_setaffinity(0, mine[:cores])
        try:
            list(Local().do([Share(tmp_path / f"{number}.txt") for number in range(runs)], runs))  # type: ignore[misc]
        finally:
            os.sched_setaffinity(0, mine)
        found = [file.read_text() for file in tmp_path.glob("*.txt")]
        assert found == [str(max(1, cores // runs))] * runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_checkpoints_and_the_next_attempt_goes_on(
    places: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def run(place: str) -> Run:
        config = compose_run(["experiment=teacher", *TINY, "optim.passes=6", *(f"{folder}/{place}" for folder in places)])
        return Run(config, Paths.of(config))

    whole = ensure(run("whole"))
    original = Checkpointer.on_train_batch_end

    def signalled(self: Checkpointer, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), number)
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "on_train_batch_end", signalled)
        with pytest.raises(Stopped, match=number.name):
            ensure(run("again"))
        assert signal.getsignal(number) == signal.SIG_DFL
    assert (run("again").folder / "last.ckpt").exists()
    assert ensure(run("again"))["metrics"] == whole["metrics"]


def test_a_signals_earlier_handler_goes_on_after_the_checkpoint(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit's does, which queues the job again."""
    heard: list[int] = []
    config = compose_run(["experiment=teacher", *TINY, *places])
    run = Run(config, Paths.of(config))
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    original = Checkpointer.save

    def save(self: Checkpointer, trainer: Any) -> None:
        assert not heard
        original(self, trainer)

    monkeypatch.setattr(Checkpointer, "save", save)
    monkeypatch.setattr(Checkpointer, "on_train_start", _then_signal(Checkpointer.on_train_start, signal.SIGUSR2))
    try:
        assert ensure(run)["status"] == "finished"
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


def _then_signal(function: Callable[..., None], number: signal.Signals) -> Callable[..., None]:
    def call(*given: Any) -> None:
        function(*given)
        os.kill(os.getpid(), number)

    return call


def test_launchers_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean slurm"):
        make_launcher("slurn")
    with pytest.raises(UserError, match="did you mean partition"):
        make_launcher("slurm", ["launcher.partitoin=gpu"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="LAUNCHER=local"):
        list(make_launcher("slurm").do([type("Any", (), {"log": Path("a/b/c/d/e")})], 1))


def test_an_interrupted_command_names_the_jobs_that_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import submitit

    jobs = [SimpleNamespace(job_id=f"812_{index}", done=lambda: False) for index in range(2)]
    executor = SimpleNamespace(submit=lambda _: jobs.pop(), batch=nullcontext, update_parameters=lambda **_: None)
    monkeypatch.setattr(submitit, "SlurmExecutor", lambda *_, **__: executor)
    monkeypatch.setattr(launchers.time, "sleep", lambda _: signal.default_int_handler(signal.SIGINT, None))
    works = [launchers.Work((), tmp_path / "runs" / "a" / "b" / "log.txt")] * 2
    with pytest.raises(KeyboardInterrupt):
        list(make_launcher("slurm").do(works, 1))
    assert capsys.readouterr().out.endswith("to end them: scancel 812\n")


def test_an_objective_is_the_experiments_and_nan_is_the_worst() -> None:
    record = {"config": {"objective": "test/accuracy"}, "metrics": {"gan_test": 71.0, "test/accuracy": None, "curve": [1.0]}}
    assert objective(record, "gan_test", "maximize") == 71.0  # and not the objective of the run that made the record
    worst = [objective(record, "test/accuracy", direction) for direction in ("maximize", "minimize")]
    assert worst == [-math.inf, math.inf]
    assert [objective(record, given, "None") for given in ("test/accuracy", "curve", None)] == [None] * 3
    for wrong in ("curve", "nothing"):
        with pytest.raises(UserError, match=f"objective={wrong}: this run measures gan_test, test/accuracy"):
            objective(record, wrong, "maximize")
    with pytest.raises(UserError, match="objective=test/acc: this"):  # as it was typed, though images may be held out
        objective({**record, "config": {"data": {"validation": 0.1}}}, "test/acc", "maximize")


@pytest.mark.parametrize(
    ("experiment", "metric"),
    [("gan_test", "gan_test"), ("noise_robustness", "test/accuracy@noise=0.1"), ("teacher", "test/accuracy")],
)
def test_the_objective_of_an_experiments_file_is_that_of_its_runs(experiment: str, metric: str) -> None:
    assert plan([f"experiment={experiment}"]).config["objective"] == metric
    assert plan([f"experiment={experiment}", "objective=seconds"]).config["objective"] == "seconds"


def test_optuna_survives_runs_that_diverge(tmp_path: Path, run_py: Callable[..., Any]) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    search += ["hydra/sweeper/sampler=grid", "optim.optimizer.lr=choice(1e35,0.001)"]
    done = run_py("-m", *search, "experiment=teacher", *TINY, "optim.passes=6")
    assert done.returncode == 0, done.stderr
    assert "diverged" in done.stdout
    (results,) = tmp_path.glob("outputs/hydra/*/optimization_results.yaml")
    assert "optim.optimizer.lr: 0.001" in results.read_text()


def test_joblib_finishes_the_others_when_one_fails(tmp_path: Path, places: list[str]) -> None:
    """In a process of its own: a copy of another one would wait for joblib's idle processes at its end."""
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "experiment=teacher", *TINY, *places]
    words += ["data.per_class=3,9999"]  # how many there are is known when a run begins
    done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "9999" in done.stderr
    assert len(list(tmp_path.rglob("results/runs/teacher/*.json"))) == 1
