"""Many runs: those without a record, upstream runs first, each in a process of this machine or a job of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

from joblib import cpu_count

from gradexp.base.errors import Stopped, UserError
from gradexp.base.ranges import Count, Index, Positive
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import ensure, usable_record
from gradexp.engine.exits import die_of_interrupt, exit_on_errors, keeping_handlers
from gradexp.engine.origin import git_state
from gradexp.engine.record import print_summary
from gradexp.engine.run import Run

POLL = 5.0  # seconds between looks at the jobs of a cluster
REQUEUED = -1  # submitit's exit code of a job that it has queued again

# A fresh interpreter takes ten seconds to import these; a process forked from a server that has imported them takes none.
PRELOADED = ["gradexp.tasks.train", "gradexp.engine.fit", "gradexp.engine.compose"]


@dataclass(frozen=True)
class Work:
    """What `python run.py OVERRIDES` does, with its output in a log; called in a process of its own.

    waits: whether to wait for another process that is doing the run, with a new log. If not, the exit code is BUSY, and what is
    printed is appended to the log, as the other process may be writing to it. product: see `ensure`.
    """

    overrides: tuple[str, ...]
    log: Path
    waits: bool = True
    product: bool = False

    def __call__(self, threads: int | None = None) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        output = self.log.open("a", buffering=1)  # stays open: an exit message is written after this function
        if self.waits:
            output.truncate(0)  # where another process is doing the run, both append to the same file
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        if threads:
            import torch

            torch.set_num_threads(threads)
        try:
            with exit_on_errors():
                run = plan(self.overrides)
                print_summary(ensure(run, product=self.product, waits=self.waits), run.config["objective"])
        except KeyboardInterrupt as interrupt:  # multiprocessing would print a traceback
            die_of_interrupt(interrupt)


@dataclass(frozen=True)
class Failure:
    command: str
    log: Path


def run_all(
    runs: Sequence[Run], *, workers: int, extra: Sequence[str] = (), launcher: Local | Slurm | None = None
) -> list[Failure]:
    """Does the runs, their upstream runs first and once. Returns those that failed, and those whose upstream run failed.

    extra: hardware overrides for every run. The cores are shared out among the workers.
    """
    launcher, stages, begun = launcher or Local(), generations(runs), time.monotonic()
    total, count, failed, wanted = sum(map(len, stages)), 0, dict[Run, Failure](), set(runs)
    for stage in stages:
        ready = []
        for run in stage:
            cause = next((failed[below] for below in run.upstream.values() if below in failed), None)
            if cause:
                failed[run] = Failure(run.command, cause.log)
            else:
                ready.append(run)
        works = [Work((*run.overrides, *extra), run.folder / "log.txt", product=run not in wanted) for run in ready]
        for index, code in launcher.do(works, workers) if works else ():
            run, log = ready[index], works[index].log
            count += 1
            seconds = time.monotonic() - begun
            print(f"[{count}/{total}] {seconds:.0f} s  {run.command}\n    {last_line(log, code)}", flush=True)
            if code:
                failed[run] = Failure(run.command, log)
    return list(failed.values())


def missing(runs: Iterable[Run]) -> list[Run]:
    """Runs without a record, once each, in order."""
    return [run for run in dict.fromkeys(runs) if not run.finished]


def generations(runs: Sequence[Run]) -> list[list[Run]]:
    """The missing ones of these runs and what must be done first, once each, every run in a later generation than its upstream
    runs. An upstream run whose record exists but whose file was deleted is done again, before the runs that would wait for it.
    """
    depth: dict[Run, int] = {}
    is_there = cache(lambda run: usable_record(run, product=True) is not None)

    def visit(run: Run) -> int:
        if run not in depth:
            below = [needed for needed in run.upstream.values() if not is_there(needed)]
            depth[run] = 1 + max(map(visit, below), default=-1)
        return depth[run]

    levels = sorted({visit(run) for run in missing(runs)})
    return [[run for run in depth if depth[run] == level] for level in range(levels[-1] + 1 if levels else 0)]


def last_line(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if code < 0:  # its last line is about its progress
        return f"killed by signal {-code}; its last output: {lines[-1] if lines else 'none'}"
    return lines[-1] if lines else f"it ended with exit code {code} and printed nothing"


def make_launcher(name: str, words: Sequence[str] = ()) -> Any:
    """The launcher of conf/launcher/NAME.yaml. words: `launcher.KEY=VALUE`. Raises UserError for an unknown name or key."""
    config = compose_run(["experiment=teacher", f"+launcher={name}", *words])
    return build(config["launcher"], where="launcher")


# --- on this machine --------------------------------------------------------------------------------------


class Local:
    """Processes of this machine, each with its part of the cores, and a GPU of its own where there are GPUs."""

    def __init__(self) -> None:
        self._running: dict[Any, tuple[Any, Any, str | None]] = {}  # {sentinel: (key, process, GPU)}
        self._stopped: int | None = None  # the signal
        self._late = False  # whether the deadline stopped the processes
        git_state()  # notes which code the server of forked processes loads

    def do(self, works: Sequence[Work], workers: int) -> Iterator[tuple[int, int]]:
        """Does all works, `workers` at a time; yields (index, exit code) when one ends. Raises Stopped as `each`."""
        waiting = iter(enumerate(works))
        return self.each(lambda: next(waiting, None), slots_of(min(workers, len(works))))

    def each(
        self, choose: Callable[[], tuple[Any, Work] | None], slots: int, *, deadline: float | None = None, warning: float = 0.0
    ) -> Iterator[tuple[Any, int]]:
        """Does `slots` works at a time; yields (key, exit code) when the work of a key ends.

        choose: (key, work) or None, asked whenever a slot is free. deadline: time.monotonic at which running processes are
        killed; `warning` seconds earlier they get SIGTERM, so that they write their checkpoints, and none is started any more.

        Raises Stopped after SIGTERM or SIGINT to this process, once the running ones have written their checkpoints.
        """
        gpus = visible_gpus()
        free: list[str | None] = [*gpus[:slots]] or [None] * slots
        threads = max(1, cpu_count() // slots)
        with keeping_handlers((signal.SIGTERM, signal.SIGINT)) as before:
            for number in before:
                signal.signal(number, self._stop)  # Ctrl-C also gives the running processes a SIGINT of their own
            while True:
                while free and not self._stopped and (chosen := choose()):
                    self._start(*chosen, threads, free.pop())
                if not self._running:
                    break
                for sentinel in self._wait(deadline, warning):
                    key, process, gpu = self._running.pop(sentinel)
                    process.join()
                    free.append(gpu)
                    yield key, process.exitcode
        if self._stopped and not self._late:
            name = signal.Signals(self._stopped).name
            raise Stopped(f"stopped by {name}; the same command goes on from what is finished", self._stopped)

    def _start(self, key: Any, work: Work, threads: int, gpu: str | None) -> None:
        process = start_process(_on_gpu, work, threads, gpu)
        self._running[process.sentinel] = key, process, gpu
        if self._stopped:  # the signal came while the process was started
            process.terminate()

    def _wait(self, deadline: float | None, warning: float) -> list[Any]:
        """The processes that have ended; none at the warning and at the deadline, when signals are sent."""
        if deadline is None:
            return connection.wait(list(self._running))
        end = deadline if self._stopped else deadline - warning
        ended = connection.wait(list(self._running), timeout=max(0.0, end - time.monotonic()))
        if not ended:
            self._late = self._late or not self._stopped
            self._stop(signal.SIGTERM)
        return ended

    def _stop(self, number: int, _: Any = None) -> None:
        """Ends the running processes: by SIGTERM, after which they write their checkpoints; the second time by SIGKILL."""
        for _key, process, _gpu in list(self._running.values()):
            (process.kill if self._stopped else process.terminate)()
        self._stopped = self._stopped or number


def start_process(task: Callable[..., None], *arguments: Any) -> Any:
    """A process, forked from the server, that does task(*arguments)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=task, args=arguments)
    process.start()
    return process


def _on_gpu(work: Work, threads: int, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    work(threads)


def slots_of(workers: int) -> int:
    """How many runs are done at a time: one on each GPU, where there are any."""
    return min(workers, len(visible_gpus()) or workers)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() and name != "-1"]
    try:
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


# --- on a cluster -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Slurm:
    """Jobs of a SLURM array, for which the command waits."""

    partition: str | None
    account: str | None
    gpus: Index
    cpus: Count
    memory_gb: Positive
    hours: Positive
    requeues: Index
    warning: Index
    array: Count

    def do(self, works: Sequence[Work], workers: int) -> Iterator[tuple[int, int]]:
        """Submits all works at once and yields (index, exit code) when a job ends."""
        import submitit

        folder = works[0].log.parents[3] / "slurm" / "%j"
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=self.requeues)
        except RuntimeError as error:
            advice = "start it on a machine where sbatch works, or use LAUNCHER=local"
            raise UserError(f"launcher=slurm: {error}; {advice}") from None
        executor.update_parameters(
            job_name="gradexp",
            time=round(60 * self.hours),
            gpus_per_node=self.gpus,
            cpus_per_task=self.cpus,
            mem=f"{round(1024 * self.memory_gb)}MB",
            partition=self.partition,
            account=self.account,
            array_parallelism=self.array,
            signal_delay_s=self.warning,
        )
        with executor.batch():
            waiting = dict(enumerate([executor.submit(Job(work.overrides, work.log, product=work.product)) for work in works]))
        try:
            while waiting:
                for index in [index for index, job in waiting.items() if job.done()]:
                    yield index, _code(waiting.pop(index))
                time.sleep(POLL if waiting else 0)
        except KeyboardInterrupt:
            jobs = " ".join(sorted({job.job_id.partition("_")[0] for job in waiting.values()}))
            print(f"the jobs go on, and the same command would submit them again; to end them: scancel {jobs}", flush=True)
            raise


class Job(Work):
    """Work whose result is its exit code, which submitit stores; it would store none of a process that exits."""

    def __call__(self, threads: int | None = None) -> int:  # type: ignore[override]
        try:
            super().__call__(threads)
        except SystemExit as error:
            if error.code == REQUEUED:
                raise
            if isinstance(error.code, int):
                return error.code
            print(error.code, file=sys.stderr)
            return 1
        return 0

    def checkpoint(self) -> Any:
        """What submitit queues again when a job is preempted: the same work, which resumes from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _code(job: Any) -> int:
    try:
        return int(job.result())
    except Exception as error:  # no result: killed, or cancelled
        print(f"job {job.job_id}: {str(error).splitlines()[0]}", flush=True)
        return 1
