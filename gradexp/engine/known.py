"""Runs by their ids: `python run.py --show ID` prints a record, `python run.py --id ID` does its run.

Like every run, that one is answered from its record where it exists; `paths.results=FOLDER` does it again elsewhere. The
record is looked for in that folder first, and in results/.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run
from gradexp.engine.record import Record, numbers_of, read_record
from gradexp.engine.run import HARDWARE, ROOT, Config, Paths, Run, hardware, part_of, record_files

SHORTEST = 4  # characters of an id that are enough if only one record begins with them


def answer(arguments: Sequence[str]) -> Run | None:
    """Prints the record for `--show ID`; returns the run for `--id ID`. Raises UserError where the id is missing or unknown."""
    option, *rest = arguments
    if not rest:
        raise UserError(f"type python run.py {option} ID")
    name, *words = rest
    for word in words:
        if option == "--show" and not word.startswith("paths.results="):
            raise UserError(f"{word}: with --show only paths.results can be set, the folder of the record")
        if part_of(word) not in HARDWARE:
            raise UserError(f"{word}: with --id only {', '.join(HARDWARE)} can be set, which do not change the run")
    named = [ROOT / Path(word.partition("=")[2]).expanduser() for word in words if word.startswith("paths.results=")]
    file = find_record(name, *named[-1:], ROOT / "results")
    record = read_record(file)
    if option == "--show":
        print(show(record, file))
        return None
    setting = compose_run(["experiment=teacher", f"scale={record['scale']}", *words])
    return run_of(record, setting, Paths.of(setting))


def find_record(name: str, *results: Path) -> Path:
    """The record whose id is or begins with `name`, in the first of these folders that has any.

    Raises UserError where there is none, or more than one.
    """
    tried = [record_files(folder, name) for folder in results if len(name) >= SHORTEST and name.isalnum()]
    files = next(filter(None, tried), [])
    if len(files) != 1:
        where = " or ".join(str(folder / "runs") for folder in results)
        matches = f"several: {', '.join(file.stem for file in files)}" if files else f"none in {where}"
        raise UserError(
            f"--id and --show take the id of one record, or its first {SHORTEST} or more characters; {name!r} matches "
            f"{matches}. gradexp.records() lists all of them"
        )
    return files[0]


def run_of(record: Record, setting: Config, paths: Paths) -> Run:
    """The run of a record, on the hardware that the config `setting` names."""
    command = tuple(shlex.split(record["command"])[2:]) if "command" in record else ()
    return Run(record["config"] | hardware(setting), paths, command)


def show(record: Record, file: Path) -> str:
    """A record as text, without the values of its curves."""
    numbers, git = numbers_of(record), record["git"]
    facts = {
        "experiment": f"{record['experiment']}, scale={record['scale']}, seed={record['seed']}",
        "command": record.get("command", "not stored (the record is older than the field); --id ID answers from it"),
        "status": f"{record['status']}, {record['ended']}",
        "time": f"{record['seconds']['wall']:.0f} s",
        "device": f"{record.get('device', 'unknown')}, precision {record.get('precision', 'unknown')}",
        "code": f"commit {git['commit'] or 'none'}{' (dirty)' if git['dirty'] else ''}",
        **{f"upstream {name}": f"{below.get('experiment', '')} {below['id']}" for name, below in record["upstream"].items()},
        **{name: "diverged" if value is None else f"{value:.6g}" for name, value in sorted(numbers.items())},
        "curves": ", ".join(name for name in record["metrics"] if name not in numbers) or "none",
        "record": str(file),
    }
    width = max(map(len, facts))
    return "\n".join([f"run {record['id']}", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])
