"""The array job of docs/cluster.md, by a stub `sbatch` that runs the script for every task of the array."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradexp.engine.run import ROOT

SBATCH = """#!/bin/bash
# Runs $1 for each task of its array at the same time; `scancel --signal=TERM` is a SIGTERM to this process.
trap 'kill -TERM $jobs 2> /dev/null' TERM
for task in 0 1; do SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash $1 > $OUT/$task.txt 2>&1 & jobs="$jobs $!"; done
for job in $jobs; do wait $job; while kill -0 $job 2> /dev/null; do wait $job; done; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> $OUT/requeued.txt
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with these commands, and OUT for what they write."""
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OUT": str(tmp_path)}


def script(folder: Path, words: str) -> Path:
    """The script of the page, with another command in its place."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    job = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "--array" in block)
    changed = re.sub(r"python scripts/reproduce\.py .*? & ", f"{words} & ", job)
    assert changed != job
    file = folder / "job.sh"
    file.write_text(changed)
    return file


def test_the_tasks_of_an_array_really_run(tmp_path: Path, cluster: dict[str, str]) -> None:
    """A budget too small for anything: each task ends with exit code 0 and what comes next."""
    places = f"paths.results={tmp_path}/results paths.outputs={tmp_path}/outputs"
    command = f"{sys.executable} scripts/reproduce.py 'figure 2.1' --budget 2s --scale quick --workers 1 --set {places}"
    done = subprocess.run(["sbatch", str(script(tmp_path, command))], env=cluster, cwd=ROOT, timeout=400)
    assert done.returncode == 0
    for task in (0, 1):
        assert "budget of" in (tmp_path / f"{task}.txt").read_text()
    assert not (tmp_path / "requeued.txt").exists()


def test_preempted_tasks_are_queued_again_and_resume(tmp_path: Path, cluster: dict[str, str]) -> None:
    """SIGTERM in the middle of two trainings: checkpoints, exit code 143, the queue; the next call finishes both."""
    places = f"paths.results={tmp_path}/results paths.outputs={tmp_path}/outputs trainer.checkpoint_every=0.3 logger=none"
    command = f"{sys.executable} scripts/reproduce.py 'table 2.1' --budget 20m --scale quick --workers 1 --set {places}"

    def preempted(condition: Callable[[], bool]) -> None:
        """Calls sbatch, which gets SIGTERM once the condition holds."""
        process = subprocess.Popen(["sbatch", str(script(tmp_path, command))], env=cluster, cwd=ROOT)
        until = time.monotonic() + 300
        while not condition() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def checkpoints() -> list[Path]:
        return list(tmp_path.glob("outputs/runs/*/*/last.ckpt"))

    preempted(lambda: len(checkpoints()) > 0)
    assert sorted((tmp_path / "requeued.txt").read_text().splitlines()) == ["requeue 7_0", "requeue 7_1"]
    stopped = {file.parent.name: torch.load(file, weights_only=True)["global_step"] for file in checkpoints()}
    assert stopped  # the other task may have been between two runs

    def records() -> dict[str, Any]:
        files = [file for name in stopped for file in tmp_path.glob(f"results/runs/*/{name}.json")]
        return {file.stem: json.loads(file.read_text()) for file in files}

    preempted(lambda: len(records()) == len(stopped))
    assert stopped.keys() == records().keys()
    for name, record in records().items():
        assert 0 < stopped[name] < record["steps"] == record["planned_steps"]
        (log,) = tmp_path.glob(f"outputs/runs/*/{name}/log.txt")
        assert "stopped by SIGTERM; the checkpoint is written" in log.read_text() and "finished" in log.read_text()
