"""BUDGET=2h make reproduce: what is run first, and what happens at the end of the budget."""

import math
import multiprocessing
import os
import threading
import time
from typing import Any

import filelock
import pytest
import reproduce
from common import planner
from stubs import Deaf, Endless, Failing

from gradexp.base.errors import UserError
from gradexp.engine import ensure
from gradexp.engine.compose import plan
from gradexp.engine.launchers import start_process
from gradexp.engine.run import ROOT, Config, Run, run_id
from gradexp.report import specs

TINY = ["scale=quick", "scale.width=0.04", "data.per_class=3", "trainer.threads=1", "logger=none"]


@pytest.fixture(autouse=True, scope="module")
def _preloaded() -> None:
    """The first process waits for imports, which take half a minute on a busy machine."""
    start_process(time.sleep, 0).join()


class Guess:
    """Estimates that a test chooses, in seconds; 1 for other runs."""

    def __init__(self, seconds: dict[Run, float] | None = None) -> None:
        self.of = {run.id: value for run, value in (seconds or {}).items()}
        self.learned: list[Run] = []

    def seconds(self, config: Config, slots: int) -> float:
        return self.of.get(run_id(config), 1.0)

    def learn(self, run: Run) -> None:
        self.learned.append(run)


def teacher(places: list[str], *words: str) -> Run:
    return plan(["experiment=teacher", *TINY, *words], places)


def spend(seconds: float, runs: list[Run], guess: Guess, places: list[str]) -> reproduce.Budget:
    ranked = {run: (number,) for number, run in enumerate(runs)}
    return reproduce.spend(seconds, ranked, guess, workers=1, extra=[*places, "trainer.threads=1"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("30m", 1800), ("1h30m", 5400), ("90s", 90), ("0.5h", 1800)])
def test_budgets_are_read(text: str, seconds: float) -> None:
    assert reproduce.seconds_of(text) == seconds


def test_a_budget_that_can_not_be_read_is_no_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After exit code 1, of a run that failed, `make` renders what there is."""
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--budget", "0s", "--scale", "quick"])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert ended.value.code == 2


@pytest.mark.parametrize("text", ["2", "h", "2 h", "0s", "two hours"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="BUDGET="):
        reproduce.seconds_of(text)


def test_every_run_has_an_estimate_where_there_is_no_record(places: list[str]) -> None:
    """Also one on all images, of a data set that no run has counted; the runs that stand on it would never be begun."""
    student = plan(["experiment=jacobian_distill", *TINY], places)
    estimates = reproduce.Estimates(reproduce.shared("quick", places), [student])
    assert all(0 < estimates.seconds(run.config, 1) < 3600 for run in (student, student.upstream["teacher"]))
    assert reproduce.duration(math.inf) == "an unknown time"


def test_headline_cells_come_first_then_deciding_runs_then_seeds() -> None:
    ranked = reproduce.priorities("cpu", planner([]), ["table 2.1", "table 2.2", "table 2.5", "table 4.1"])
    order = sorted(ranked, key=lambda run: ranked[run])
    first = [run for cell in specs.cells(specs.load("table", "2.1"), "cpu") for run in [planner([])(cell.commands[0])]]
    assert set(order[: len(set(first))]) == set(first)
    deciding = [run for run in order if ranked[run][:2] == (0, 1)]
    assert {run.config["seed"] for run in deciding} >= {1, 2, 3, 4}
    assert all(run.name in ("jacobian_distill", "fullgrad_distill") for run in deciding)
    others = [run for run in order if ranked[run][1] == 2]
    assert {ranked[run][0] for run in others if run.config["seed"] == 0} == {0}
    assert order.index(deciding[-1]) < order.index(others[0])


def test_only_the_named_table() -> None:
    ranked = reproduce.priorities("quick", planner([]), ["table 2.1"])
    assert {run.name for run in ranked} == {"jacobian_distill"}
    with pytest.raises(UserError, match=r"has no table 2\.9"):
        reproduce.priorities("quick", planner([]), ["table 2.9"])


def test_a_table_of_ones_own_is_done_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, file = planner([]), ROOT / "conf" / "table" / "2.1.yaml"
    wanted = reproduce.priorities("quick", planned, ["table 2.1"])
    monkeypatch.setattr(reproduce.specs, "own", lambda kind: {"mine": file} if kind == "table" else {})
    assert reproduce.priorities("quick", planned, ["table mine"]).keys() == wanted.keys()
    with pytest.raises(UserError, match="scale=quick has no table yours"):
        reproduce.priorities("quick", planned, ["table yours"])


def test_every_cell_of_the_order_exists() -> None:
    """A misspelt item, row or column of conf/budget.yaml would be ignored."""
    wanted: Any = reproduce.read_yaml(reproduce.BUDGET)
    names = {f"{kind} {number}" for kind in specs.KINDS for number in specs.numbers(kind)}
    assert {*wanted["headline"], *(entry["item"] for entry in wanted["deciding"])} <= names
    for entry in wanted["deciding"]:
        kind, _, number = entry["item"].partition(" ")
        spec = specs.load(kind, number)
        for key in ("rows", "columns"):
            assert {*entry.get(key, [])} <= {line["label"] for line in spec[key]}


def test_a_budget_too_small_for_anything(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = teacher(places)
    budget = spend(5, [run], Guess({run: 3600}), places)
    assert not (budget.done or budget.stopped or budget.failed)
    assert not run.folder.exists()
    assert "nothing fits into the budget" in (out := capsys.readouterr().out)
    assert f"takes about 1 h 00 min, start it by its command: {run.command}" in out


def test_a_run_longer_than_the_budget_is_named_with_its_estimate(places: list[str]) -> None:
    short, long = teacher(places), teacher(places, "seed=1")
    budget = reproduce.Budget({long: (0,), short: (1,)}, Guess({long: 7300}), time.monotonic() + 60, 1, 60)  # type: ignore[arg-type]
    (line,) = [line for line in budget.summary() if "longer" in line]
    assert "longer than the budget: 1, never begun in it" in line
    assert f"about 2 h 02 min, start it by its command: {long.command}" in line


def test_the_most_wanted_run_that_fits_comes_first_and_its_upstream_run_before_it(places: list[str]) -> None:
    dear, student = teacher(places, "seed=1"), plan(["experiment=jacobian_distill", *TINY], places)
    below = student.upstream["teacher"]
    budget = reproduce.Budget({dear: (0,), student: (1,)}, Guess({dear: 500, below: 40, student: 20}), 0, 1, 50)  # type: ignore[arg-type]
    budget.deadline = time.monotonic() + 50
    assert budget.choose() is None  # teacher and student together take 60 s
    budget.deadline = time.monotonic() + 70
    chosen = budget.choose()
    assert chosen is not None and chosen[0] == below
    assert budget.choose() is None  # the student waits for it
    budget.deadline = time.monotonic() + 600
    assert budget.choose()[0] == dear  # type: ignore[index]


def test_a_budget_that_ends_in_the_middle_of_a_run(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was thought to take a second. It is stopped in time with a checkpoint, and begun again with the next budget."""
    monkeypatch.setattr(reproduce, "Work", Endless)
    run, begun = teacher(places), time.monotonic()
    budget = spend(10, [run], Guess(), places)
    assert 7 < time.monotonic() - begun < 11
    assert budget.stopped == [run] and not budget.failed and run.checkpoint.exists()
    assert f"resumes next time: {run.command}" in capsys.readouterr().out
    spend(10, [run], Guess(), places)
    assert (run.folder / "begun").read_text() == "after a checkpoint: False\nafter a checkpoint: True\n"


def test_a_run_that_does_not_stop_is_killed_at_the_end(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "Work", Deaf)
    run, begun = teacher(places), time.monotonic()
    budget = spend(10, [run], Guess(), places)
    assert 10 <= time.monotonic() - begun < 13
    assert budget.stopped == [run] and (run.folder / "heard").exists() and not run.checkpoint.exists()


def test_a_run_that_takes_three_times_its_estimate(places: list[str]) -> None:
    """What follows is expected to be late as well: it would have fitted by its own estimate."""
    first, second = teacher(places, "optim.passes=2"), teacher(places, "optim.passes=2", "seed=1")
    guess = Guess({first: 1000, second: 25})
    budget = reproduce.Budget({first: (0,), second: (1,)}, guess, time.monotonic() + 60, 1, 60)  # type: ignore[arg-type]
    assert budget.cost(second) == 25
    budget.running[first] = time.monotonic() - 60, 20.0
    first.record_path.parent.mkdir(parents=True)
    first.record_path.write_text("{}")
    budget.note(first, 0)
    assert budget.done == [first] and guess.learned == [first]
    assert budget.ratios == [pytest.approx(3, abs=0.1)]
    assert budget.cost(second) == pytest.approx(50, abs=2)  # between its estimate and three times it
    budget.deadline = time.monotonic() + 40
    assert budget.choose() is None


def test_a_run_that_another_process_is_doing_is_left_to_it(places: list[str]) -> None:
    runs = [teacher(places), teacher(places, "seed=1")]
    budget = reproduce.Budget({run: (n,) for n, run in enumerate(runs)}, Guess(), time.monotonic() + 60, 1, 60)  # type: ignore[arg-type]
    lock = runs[0].paths.outputs / "locks" / f"{runs[0].id}.lock"
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock):
        assert budget.choose()[0] == runs[1]  # type: ignore[index]
    budget.running.clear()
    assert budget.choose()[0] == runs[0]  # type: ignore[index]


def spend_at_once(places: list[str], barrier: Any, results: Any) -> None:
    """Spends a budget on two runs, begun at the same time as another process."""
    runs = [teacher(places), teacher(places, "seed=1")]
    start_process(time.sleep, 0).join()
    barrier.wait()
    results.put(len(spend(240, runs, Guess(), places).failed))


def test_jobs_that_start_together_do_not_wait_for_each_other(places: list[str]) -> None:
    """Both choose the first run before either has its lock."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    jobs = [context.Process(target=spend_at_once, args=(places, barrier, results)) for _ in range(2)]
    for job in jobs:
        job.start()
    failed = [results.get(timeout=300) for _ in jobs]
    for job in jobs:
        job.join()
    logs = [file.read_text() for file in teacher(places).folder.parent.glob("*/log.txt")]
    assert failed == [0, 0] and len(logs) == 2 and not any("waiting for" in log for log in logs)


def test_a_run_whose_lock_another_job_took_first_is_left_to_it(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not yet locked when it was chosen. The process adds to the log of the other job's run, and another run is done."""
    monkeypatch.setattr(reproduce, "_locked", lambda run: False)
    monkeypatch.setattr(reproduce, "RETRY", 60.0)  # longer than the budget: not in it
    runs = [teacher(places), teacher(places, "seed=1")]
    log = runs[0].folder / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    with ensure._locked(runs[0]):
        budget = spend(40, runs, Guess(), places)
    assert budget.done == [runs[1]] and not budget.failed
    assert log.read_text().startswith("step 1\n") and f"left to process {os.getpid()} on host" in log.read_text()


def test_a_run_that_stands_on_that_of_another_job_is_done_after_it(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other job ends without the upstream run here, which is then done as well."""
    monkeypatch.setattr(reproduce, "RETRY", 0.2)
    monkeypatch.setattr(reproduce, "Work", Failing)
    student = plan(["experiment=jacobian_distill", *TINY], places)
    below = student.upstream["teacher"]
    lock = below.paths.outputs / "locks" / f"{below.id}.lock"
    lock.parent.mkdir(parents=True)
    held = filelock.FileLock(lock, thread_local=False)
    held.acquire()
    timer = threading.Timer(2, held.release)
    timer.start()
    budget = spend(60, [student], Guess(), places)
    timer.join()
    assert set(budget.failed) == {below}


def test_a_run_that_fails_is_reported_and_not_tried_again(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "Work", Failing)
    run = teacher(places)
    budget = spend(60, [run], Guess(), places)
    assert budget.failed == {run: "error: something is wrong"}
    assert "1 failed" in capsys.readouterr().out
