"""One training by several processes, on one machine or several: trainer=ddp.

The run (its lock, upstream runs and record) stays in the process that the user started; only the training steps are shared.
The result comes back as the checkpoint that the first of the processes writes last.

    python -m gradexp.engine.processes PART CONFIG DEVICES NODES HOST:PORT

starts the processes of one machine of several; srun runs it on each.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any, NamedTuple

from gradexp.base.errors import UserError
from gradexp.engine.callbacks import SIGNALS, call_handler
from gradexp.engine.run import Run

GRACE = 20  # seconds that processes have to write their checkpoint after a signal; SLURM kills after 30
EXITED = 128  # exit codes of processes that were stopped are this plus the number of the signal, as a shell reports them

Part = Callable[[str], None]  # what each process does, called with the run's config as JSON


def check_machines(nodes: int) -> None:
    """Raises UserError for several machines outside a SLURM job."""
    if nodes > 1 and "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError(f"trainer.num_nodes={nodes} needs a SLURM job of {nodes} machines; see docs/cluster.md")


def train_together(run: Run, part: Part, *, devices: int, nodes: int) -> None:
    """Trains with `devices` processes on each of `nodes` machines.

    Raises Stopped after a signal, UserError where a process failed.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    text = json.dumps(run.config)
    while True:
        try:
            end = launch(part, text, devices) if nodes == 1 else _launch_everywhere(run, part, text, devices, nodes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if end is None:
            return
        call_handler(end.number, before[end.number], run.checkpoint, written=end.written)


class End(NamedTuple):
    """How processes were stopped: by which signal, and whether they wrote a checkpoint after it."""

    number: int
    written: bool


def launch(part: Part, text: str, devices: int, nodes: int = 1, endpoint: str = "localhost:0") -> End | None:
    """Starts this machine's processes and waits for them. A signal is passed on to all of them.

    Returns None where they finished. Raises UserError where one failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns when every parameter is used
    with tempfile.TemporaryDirectory(prefix="gradexp-") as logs, _quiet(), _passing_signals_on() as caught:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=devices,
            run_id="gradexp",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            max_restarts=0,
            start_method="spawn",  # a server that forks them would end at a signal to the group, and their exit codes with it
            signals_to_handle="SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, part)(text)
        except SignalException as error:
            return End(caught[0] if caught else int(error.sigval), written=False)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items())
            number = int(failure.exitcode - EXITED if failure.exitcode > EXITED else -failure.exitcode)
            if caught or number in SIGNALS:
                # After the checkpoint they exit with EXITED + signal; before it, the signal itself ends them.
                return End(caught[0] if caught else number, written=failure.exitcode - EXITED in SIGNALS)
            raise UserError(_failure(rank, failure.exitcode)) from None
    return None


def _failure(rank: int, code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"process {rank} of the training was killed by {name}; the same command resumes from the last checkpoint"
    return f"process {rank} of the training ended with exit code {code}; its message is above"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch's launcher about processes that fail or are stopped; these print their own errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """Passes signals on to the child processes, and kills those that have not ended GRACE seconds later.

    Yields the signals that came. Before there are children, one raises torch's SignalException.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    caught: list[int] = []

    def kill(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    def stop(number: int, _: Any) -> None:
        if signal.SIGINT in caught and number == signal.SIGINT:  # of an impatient user
            kill()
        caught.append(number)
        signal.alarm(GRACE)
        children = multiprocessing.active_children()
        if not children:
            raise SignalException("stopped", signal.Signals(number))
        for child in children:  # which Ctrl-C has signalled already
            os.kill(child.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)

    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, kill if number == signal.SIGALRM else stop)
    try:
        yield caught
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _launch_everywhere(run: Run, part: Part, text: str, devices: int, nodes: int) -> End | None:
    """Calls `launch` on every machine of the SLURM job."""
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    host = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000  # jobs that share a machine rarely get the same port
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words = [f"{part.__module__}:{part.__name__}", text, str(devices), str(nodes), f"{host}:{port}"]
    command = [*step, sys.executable, "-m", "gradexp.engine.processes", *words]
    caught: list[int] = []
    earlier: list[int | None] = []

    def checkpoint_time() -> int | None:
        return run.checkpoint.stat().st_mtime_ns if run.checkpoint.exists() else None

    def forward(number: int, _: Any) -> None:
        earlier.append(checkpoint_time())
        caught.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    process = subprocess.Popen(command)
    for number in SIGNALS:
        signal.signal(number, forward)
    code = process.wait()
    if code and not caught:
        raise UserError(f"srun ended with exit code {code}; the message of the process that failed is above")
    return End(caught[0], written=checkpoint_time() != earlier[0]) if caught else None


if __name__ == "__main__":
    name, given, devices, nodes, endpoint = sys.argv[1:]
    sys.exit(0 if launch(resolve_name(name), given, int(devices), int(nodes), endpoint) is None else 1)
