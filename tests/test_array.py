"""Jobs on a cluster, by stubs of SLURM's commands that run what they are given: docs/cluster.md's array, and LAUNCHER=slurm."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradexp.engine import launchers
from gradexp.engine.compose import plan
from gradexp.engine.run import ROOT

SBATCH = """#!/bin/bash
# Runs $1 for each task of its array at the same time; `scancel --signal=TERM` is a SIGTERM to this process.
trap 'kill -TERM $jobs 2> /dev/null' TERM
for task in ${TASKS:-0 1}; do
    SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash $1 > $OUT/$task.txt 2>&1 & jobs="$jobs $!"
done
for job in $jobs; do wait $job; while kill -0 $job 2> /dev/null; do wait $job; done; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> $OUT/requeued.txt
"""
# The commands that submitit calls: one array, whose jobs run at the same time; a job that is queued again starts again.
SUBMITTED = {
    "sbatch": """#!/bin/bash
grep -q -- '--array=0-1%' $1 || exit 1
cp $1 $OUT/job.sh
for task in 0 1; do start $task; done
echo Submitted batch job 7
""",
    "start": """#!/bin/bash
SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$1 SLURM_JOB_ID=7$1 setsid bash $OUT/job.sh > $OUT/$1.txt 2>&1 < /dev/null &
""",
    "srun": """#!/bin/bash
echo $$ > $OUT/$SLURM_JOB_ID.pid
while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
""",
    "scontrol": """#!/bin/bash
echo "$@" >> $OUT/requeued.txt
(sleep 1; start ${2#*_}) > /dev/null 2>&1 &
""",
    "sacct": """#!/bin/bash
printf 'JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n'
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with these commands, and OUT for what they write."""
    return machine(tmp_path, {"sbatch": SBATCH, "scontrol": SCONTROL})


def machine(folder: Path, commands: dict[str, str]) -> dict[str, str]:
    for name, text in commands.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OUT": str(folder)}


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
    """SIGTERM in the middle of a training: a checkpoint, exit code 143, the queue; the next call finishes it."""
    environment = cluster | {"TASKS": "0"}  # tests/test_budget.py has two at a time
    places = f"paths.results={tmp_path}/results paths.outputs={tmp_path}/outputs trainer.checkpoint_every=0 logger=none"
    command = f"{sys.executable} scripts/reproduce.py 'table 2.1' --budget 20m --scale quick --workers 1 --set {places}"

    def preempted(condition: Callable[[], bool]) -> None:
        """Calls sbatch, which gets SIGTERM once the condition holds."""
        process = subprocess.Popen(["sbatch", str(script(tmp_path, command))], env=environment, cwd=ROOT)
        until = time.monotonic() + 300
        while not condition() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def checkpoints() -> list[Path]:
        return list(tmp_path.glob("outputs/runs/*/*/last.ckpt"))

    preempted(lambda: len(checkpoints()) > 0)
    assert sorted((tmp_path / "requeued.txt").read_text().splitlines()) == ["requeue 7_0"]
    stopped = {file.parent.name: torch.load(file, weights_only=True)["global_step"] for file in checkpoints()}
    assert len(stopped) == 1

    def records() -> dict[str, Any]:
        files = [file for name in stopped for file in tmp_path.glob(f"results/runs/*/{name}.json")]
        return {file.stem: json.loads(file.read_text()) for file in files}

    preempted(lambda: len(records()) == len(stopped))
    assert stopped.keys() == records().keys()
    for name, record in records().items():
        assert 0 < stopped[name] < record["steps"] == record["planned_steps"]
        (log,) = tmp_path.glob(f"outputs/runs/*/{name}/log.txt")
        assert "stopped by SIGTERM; the same command resumes from the last checkpoint" in log.read_text()


def test_jobs_through_submitit(tmp_path: Path, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two teachers and a student. One fails, and the student is not begun; the other gets the signal that comes before the end
    of a job's time: it writes its checkpoint, is queued again and finishes."""
    for name, value in machine(tmp_path, SUBMITTED).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers, "POLL", 0.2)
    launcher = launchers.make_launcher("slurm", ["launcher.gpus=0", "launcher.hours=0.1"])
    tiny = ["scale=quick", "scale.width=0.04", "data.per_class=3", "trainer.threads=1", "logger=none"]
    distil = ["experiment=jacobian_distill", "+upstream.teacher.data.per_class=1000", "method=a", *tiny]
    signalled, student = plan(["experiment=teacher", *tiny, "optim.passes=400"], places), plan(distil, places)

    def warn() -> None:
        """SIGUSR2 to the job that trains, as SLURM sends it."""
        while not signalled.checkpoint.exists():
            time.sleep(0.05)
        os.kill(int((tmp_path / "70.pid").read_text()), signal.SIGUSR2)

    warning = threading.Thread(target=warn, daemon=True)
    warning.start()
    extra = ["trainer.threads=1", "trainer.checkpoint_every=0.3", *places]
    failures = launchers.run_all([signalled, student], workers=1, extra=extra, launcher=launcher)
    record = signalled.record()
    assert record and record["steps"] == record["planned_steps"]
    assert (tmp_path / "requeued.txt").read_text() == "requeue 7_0\n"
    assert [failure.command for failure in failures] == [student.upstream["teacher"].command, student.command]
    assert failures[0].log == failures[1].log and "ask for at most" in failures[0].log.read_text()
    assert [file.stem for file in tmp_path.rglob("results/runs/*/*.json")] == [signalled.id]
