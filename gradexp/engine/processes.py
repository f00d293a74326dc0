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
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from gradexp.base.errors import STOPPED, UserError
from gradexp.engine.callbacks import SIGNALS, call_handler
from gradexp.engine.run import Run

GRACE = 60  # seconds that processes have to write their checkpoint after a signal

Part = Callable[[str], None]  # what each process does, called with the run's config as JSON


def check_machines(nodes: int) -> None:
    """Raises UserError for several machines outside a SLURM job."""
    if nodes > 1 and "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError(f"trainer.num_nodes={nodes} needs a SLURM job of {nodes} machines; see docs/cluster.md")


def train_together(run: Run, part: Part, *, devices: int, nodes: int) -> None:
    """Trains with `devices` processes on each of `nodes` machines.

    Raises Stopped after a signal, RuntimeError where a process failed.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    text = json.dumps(run.config)
    while True:
        try:
            caught = launch(part, text, devices) if nodes == 1 else _launch_everywhere(part, text, devices, nodes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if caught is None:
            return
        call_handler(caught, before[caught], run.checkpoint)


def launch(part: Part, text: str, devices: int, nodes: int = 1, endpoint: str = "localhost:0") -> int | None:
    """Starts this machine's processes and waits for them.

    Returns the signal that stopped them, whichever got it; None where they finished. Raises RuntimeError where one failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id="gradexp",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,
        start_method="forkserver",
        signals_to_handle=",".join(number.name for number in (*SIGNALS, signal.SIGINT)),
        shutdown_timeout=GRACE,
    )
    multiprocessing.set_forkserver_preload([part.__module__])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns when every parameter is used
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process prints its own error
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, part)(text)
    except SignalException as caught:
        if caught.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return int(caught.sigval)
    except ChildFailedError as error:
        if all(failure.exitcode == STOPPED for failure in error.failures.values()):
            return int(signal.SIGTERM)
        raise RuntimeError(f"process {min(error.failures)} of the training failed; its message is above") from None
    return None


def _launch_everywhere(part: Part, text: str, devices: int, nodes: int) -> int | None:
    """Calls `launch` on every machine of the SLURM job."""
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    host = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000  # jobs that share a machine rarely get the same port
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words = [f"{part.__module__}:{part.__name__}", text, str(devices), str(nodes), f"{host}:{port}"]
    command = [*step, sys.executable, "-m", "gradexp.engine.processes", *words]
    caught: list[int] = []

    def forward(number: int, _: Any) -> None:
        caught.append(number)
        process.send_signal(number)

    process = subprocess.Popen(command)
    for number in SIGNALS:
        signal.signal(number, forward)
    code = process.wait()
    if code and not caught:
        raise RuntimeError(f"srun ended with exit code {code}; the message of the process that failed is above")
    return caught[0] if caught else None


if __name__ == "__main__":
    name, given, devices, nodes, endpoint = sys.argv[1:]
    sys.exit(0 if launch(resolve_name(name), given, int(devices), int(nodes), endpoint) is None else 1)
