"""Where the runs of a table are done: in processes of this machine, or in jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from joblib import cpu_count

from gradexp.base.errors import Stopped, UserError
from gradexp.base.files import host
from gradexp.base.ranges import Count, Index, Positive
from gradexp.engine.compose import plan
from gradexp.engine.ensure import ensure
from gradexp.engine.exits import die_of_interrupt, exit_on_errors
from gradexp.engine.loggers import COMMAND
from gradexp.engine.origin import git_state
from gradexp.engine.record import print_summary

# A fresh interpreter takes ten seconds to import these; a process forked from a server that has imported them takes none.
PRELOADED = ["gradexp.tasks.train", "gradexp.engine.fit", "gradexp.engine.compose"]


@dataclass(frozen=True)
class Work:
    """What `python run.py OVERRIDES` does, with its output in a log; called in a process of its own."""

    overrides: tuple[str, ...]
    log: Path

    def __call__(self, threads: int | None = None) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        output = self.log.open("w", buffering=1)  # stays open: an exit message is written after this function
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        if threads:
            import torch

            torch.set_num_threads(threads)
        try:
            with exit_on_errors():
                print_summary(ensure(plan(self.overrides)))
        except KeyboardInterrupt as interrupt:  # multiprocessing would print a traceback
            sys.excepthook(KeyboardInterrupt, interrupt, None)
            die_of_interrupt()
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What submitit queues again when a job is preempted: the same work, which resumes from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Local:
    """Up to `workers` processes at a time, each with its part of the cores, and a GPU of its own where there are GPUs."""

    def __init__(self) -> None:
        self._running: dict[Any, tuple[int, Any, str | None]] = {}  # {sentinel: (index, process, GPU)}
        self._stopped: int | None = None  # the signal
        git_state()  # notes which code the server of forked processes loads
        os.environ.setdefault(COMMAND, f"{host()}-{os.getpid()}-{secrets.token_hex(4)}")

    def do(self, works: Sequence[Work], workers: int) -> Iterator[tuple[int, int]]:
        """Does all works and yields (index, exit code) when one ends.

        Raises Stopped after SIGTERM or SIGINT, once the running processes have written their checkpoints.
        """
        gpus = visible_gpus()
        count = min(workers, len(works), len(gpus) or workers)
        free: list[str | None] = [*gpus[:count]] or [None] * count
        threads = max(1, cpu_count() // count)
        waiting = list(enumerate(works))
        with self._forwarding_signals():
            while self._running or (waiting and not self._stopped):
                while waiting and free and not self._stopped:
                    self._start(*waiting.pop(0), threads, free.pop())
                for sentinel in connection.wait(list(self._running)):
                    index, process, gpu = self._running[sentinel]
                    process.join()
                    del self._running[sentinel]
                    free.append(gpu)
                    yield index, process.exitcode
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            name = signal.Signals(self._stopped).name
            raise Stopped(f"stopped by {name}; the same command goes on from what is finished", self._stopped)

    def _start(self, index: int, work: Work, threads: int, gpu: str | None) -> None:
        process = start_process(_on_gpu, work, threads, gpu)
        self._running[process.sentinel] = index, process, gpu
        if self._stopped:  # the signal came while the process was started
            process.terminate()

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the running processes by SIGTERM; Ctrl-C gives these SIGINT of their own. Again: SIGKILL."""

        def stop(number: int, _: Any) -> None:
            for _index, process, _gpu in list(self._running.values()):
                if self._stopped:
                    process.kill()
                else:
                    process.terminate()
            self._stopped = self._stopped or number

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() and name != "-1"]
    try:
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


class Slurm:
    """Jobs of a SLURM array, for which the command waits. cluster: `slurm`, or `local` for submitit's local processes."""

    def __init__(
        self,
        *,
        cluster: str,
        partition: str | None,
        account: str | None,
        gpus: Index,
        cpus: Count,
        memory_gb: Positive,
        hours: Positive,
        requeues: Index,
        warning: Index,
        array: Count,
    ) -> None:
        self.cluster, self.requeues, self.poll = cluster, requeues, 5.0 if cluster == "slurm" else 0.2
        self.common = {"timeout_min": round(60 * hours), "gpus_per_node": gpus, "cpus_per_task": cpus, "mem_gb": memory_gb}
        given = {"slurm_partition": partition, "slurm_account": account, "slurm_array_parallelism": array}
        given["slurm_signal_delay_s"] = warning
        self.slurm = {key: value for key, value in given.items() if value is not None} if cluster == "slurm" else {}

    def do(self, works: Sequence[Work], workers: int) -> Iterator[tuple[int, int]]:
        """Submits all works at once and yields (index, exit code) when a job ends."""
        import submitit

        folder = works[0].log.parents[3] / "slurm" / "%j"
        options = {f"{self.cluster}_max_num_timeout": self.requeues}
        try:
            executor = submitit.AutoExecutor(folder, cluster=self.cluster, **options)
        except RuntimeError as error:
            advice = "start it on a machine where sbatch works, or use LAUNCHER=local"
            raise UserError(f"launcher=slurm: {error}; {advice}") from None
        executor.update_parameters(**self.common, **self.slurm, name="gradexp")
        with executor.batch():
            jobs = [executor.submit(work) for work in works]
        waiting = dict(enumerate(jobs))
        while waiting:
            for index in [index for index, job in waiting.items() if job.done()]:
                yield index, _code(waiting.pop(index))
            time.sleep(self.poll)


def _code(job: Any) -> int:
    try:
        return 1 if job.exception() else 0
    except Exception as error:  # no result: killed, or cancelled
        print(f"job {job.job_id}: {str(error).splitlines()[0]}", flush=True)
        return 1
