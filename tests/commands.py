"""Commands in copies of one process that has imported what they need: importing it takes each new process seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from gradexp.engine.run import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["commands", "gradexp.engine.fit", "gradexp.engine.help", "gradexp.report.specs", "gradexp.tasks"]
)


def run_python(*words: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ...` or `python -m MODULE ...`.

    Signals and variables that count while Python starts need a process of their own, with subprocess.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        files = [DupFd(file.fileno()) for file in (output, errors)]
        process = CONTEXT.Process(target=_script, args=([str(word) for word in words], dict(env or os.environ), cwd, *files))
        process.start()
        process.join()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode or 0, output.read(), errors.read())


def _script(words: list[str], environment: dict[str, str], folder: Path, output: Any, errors: Any) -> None:
    os.dup2(output.detach(), 1)
    os.dup2(errors.detach(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first = str(folder) if words[0] == "-m" else str((folder / words[0]).parent)
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
