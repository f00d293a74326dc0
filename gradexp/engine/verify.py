"""Checks records: whether they are valid, agree with the code of today, and repeat."""

from __future__ import annotations

import json
import random
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.base.texts import read_yaml
from gradexp.engine.build import MOVED, locate, targets
from gradexp.engine.compose import compose_run, conf_folders
from gradexp.engine.ensure import ensure, is_product
from gradexp.engine.hardware import native_bf16
from gradexp.engine.known import run_of
from gradexp.engine.origin import SOURCES
from gradexp.engine.record import Record, Used, differing_split, nested, read_arrays, read_record, used_digests
from gradexp.engine.run import ROOT, Config, Paths, record_files, run_id
from gradexp.engine.task import task_of

# How much two machines, which round differently, may differ by: percentage points of accuracy; relative for other metrics.
POINTS, RELATIVE, ROUNDING = 2.0, 0.02, 1e-6  # rounding: of errors that are 0 but for it
LISTED = 5  # ids in a note
OWN = ROOT / "results" / "verify"  # records of tiny runs that are kept to be repeated (docs/reliability.md)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a record, and how to fix it."""

    record: Path
    what: str


def verify(paths: Paths, *, sample: int, seed: int, extra: Config) -> Iterator[Finding | str]:
    """Checks every record and the files on this disk, then repeats `sample` quick ones. Yields what is wrong, and notes.

    extra: the trainer, logger and gradients of the repeats.
    """
    files = record_files(paths.results)
    good: list[Path] = []
    for file in files:
        wrong = list(examine(file, paths.outputs))
        yield from (Finding(file, what) for what in wrong)
        good += [] if wrong else [file]
    yield f"{len(good)} of {len(files)} records: complete, with correct digests and ids"
    yield from notes(good, paths)
    quick = [file for file in good if read_record(file)["scale"] == "quick"]
    if len(quick) < len(good):
        yield f"{len(good) - len(quick)} records are not repeated: only those at scale=quick take seconds"
    repeatable = [file for file in quick if read_record(file).get("precision") != "bf16" or native_bf16("cpu")]
    if sample and len(repeatable) < len(quick):
        yield f"{len(quick) - len(repeatable)} quick records are not repeated: this processor has no bf16 arithmetic"
    chosen = random.Random(seed).sample(repeatable, min(sample, len(repeatable)))
    yield from repeated(chosen, paths, extra, "repeated")


def examine(file: Path, outputs: Path) -> Iterator[str]:
    """What is wrong with one record and the files on this disk, beyond what every reader checks, without repeating it."""
    try:
        record = read_record(file)
        if "arrays" in record:
            read_arrays(file)
    except UserError as error:
        yield str(error)
        return
    outdated = list(_outdated(record["config"]))
    yield from outdated
    if "command" in record and not outdated:
        try:
            today = run_id(compose_run(shlex.split(record["command"])[2:]))
        except UserError as error:
            yield f"its command can't be typed today: {error}"
        else:
            if today != record["id"]:
                yield f"its command makes another run today, {today}; type --id {record['id']} to do this one again"
    for name, upstream in record["upstream"].items():
        named = record["config"]["upstream"].get(name)
        if named is None or run_id(named) != upstream["id"]:
            yield f"its upstream {name} is not the run that its config names; delete it and run again"
        with suppress(UserError):  # the upstream record is missing, or wrong itself
            other = _record_below(file, upstream)
            if split := differing_split(record.get("data", {}), other.get("data", {})):
                yield f"its upstream {name}, {upstream['id']}, used other {split} images; delete the wrong one and run it again"
    folder = outputs / "runs" / record["experiment"] / record["id"]
    product = "" if outdated else task_of(record["config"]).product
    if product and (folder / product).exists() and not is_product(folder / product, record):
        yield f"{folder / product} is damaged or of another run; delete {folder}"


def _outdated(config: Config) -> Iterator[str]:
    """What of a config the code of today does not have, or does differently."""
    for where, node in targets(config):
        try:
            locate(node["_target_"], where)
        except UserError as error:
            yield f"its config no longer resolves: {error}"
    for run in nested(config):
        target, was = run["task"]["_target_"], run["task"].get("version")
        now = _versions(conf_folders()).get(MOVED.get(target, target), was)
        if was != now:
            yield f"the task's version of {run['name']} is {was}, today's {now}: tables no longer count it; run it again"


@cache
def _versions(folders: tuple[Path, ...]) -> dict[str, int]:
    """{class: today's version} of the tasks."""
    tasks = [read_yaml(file) for folder in folders for file in folder.glob("task/*.yaml")]
    return {task["_target_"]: task.get("version") for task in tasks}


def notes(files: Sequence[Path], paths: Paths) -> Iterator[str]:
    """What a reader of these records should know, though nothing is wrong: by which sources, and from which files."""
    records = {file: read_record(file) for file in files}
    dated = {file.stem: record["sources"] for file, record in records.items() if "sources" in record}
    if len(dated) < len(files):
        yield f"{len(files) - len(dated)} records do not state by which sources they were computed: they are older"
    changed: dict[str, list[str]] = {}
    for name, sources in dated.items():
        differing = [package for package, digest in SOURCES.items() if sources.get(package, digest) != digest]
        if differing:
            changed.setdefault(", ".join(differing), []).append(name)
    for packages, names in changed.items():
        yield f"{len(names)} records were computed by other sources of {packages} than today's: {_listed(names)}"
    again = [file.stem for file, record in records.items() if _made_again(record, paths)]
    if again:
        yield f"the files of {len(again)} runs were made again on this machine, with other last bits: {_listed(again)}"
    others = [file.stem for file, record in records.items() if _stands_on_another(file, record)]
    if others:
        yield f"{len(others)} records stand on another making of an upstream run than its record: {_listed(others)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _made_again(record: Record, paths: Paths) -> bool:
    if "product" not in record:
        return False
    file = paths.outputs / "runs" / record["experiment"] / record["id"] / record["product"]["file"]
    return file.exists() and sha256(file) != record["product"]["sha256"]


def _record_below(file: Path, upstream: Used) -> Record:
    """The record of an upstream run, among the same results as `file`."""
    return read_record(file.parents[1] / upstream.get("experiment", "") / f"{upstream['id']}.json")


def _stands_on_another(file: Path, record: Record) -> bool:
    for name, digest in used_digests(record["upstream"]).items():
        with suppress(UserError):  # the upstream record is missing
            upstream = _record_below(file, record["upstream"][name])
            if upstream.get("product", {}).get("sha256", digest) != digest:
                return True
    return False


def repeat_own(paths: Paths, extra: Config) -> Iterator[Finding | str]:
    """Repeats the runs that the repository keeps for this: their numbers depend on terms, gradients, saliency and scores."""
    return repeated(record_files(OWN), paths, extra, "kept to be repeated")


def repeated(files: Sequence[Path], paths: Paths, extra: Config, which: str) -> Iterator[Finding | str]:
    for file in files:
        wrong = list(repeat(file, paths, extra))
        yield from (Finding(file, what) for what in wrong)
        if not wrong:
            yield f"{file.parent.name} {file.stem}, {which}: the same numbers"


def repeat(file: Path, paths: Paths, extra: Config) -> Iterator[str]:
    """Does a run again from nothing, upstream runs included, and compares fingerprints and numbers."""
    record = read_record(file)
    with tempfile.TemporaryDirectory(prefix="gradexp-verify-") as folder:
        elsewhere = Paths(paths.data, Path(folder) / "results", Path(folder) / "outputs")
        try:
            fresh = _repeat(record, file.parents[2], extra, elsewhere)
        except UserError as error:
            yield f"it cannot be repeated: {error}"
            return
    if fresh.get("data") != record.get("data"):
        yield f"the data was {json.dumps(record.get('data'))}, now {json.dumps(fresh.get('data'))}"
    if fresh["status"] != record["status"]:
        yield f"it {record['status']}, now it {fresh['status']}"
    for name, old in record["metrics"].items():
        new = fresh["metrics"].get(name)
        if not alike(name, old, new):
            yield f"{name} was {_short(old)}, now it is {_short(new)}"


def _repeat(record: Record, results: Path, setting: Config, elsewhere: Paths) -> Record:
    """Repeats the upstream runs of a record, then its own, each with the threads and precision that it had.

    With another number of threads sums are rounded differently, and a training ends elsewhere.
    """
    for below in record["upstream"].values():
        file = results / "runs" / below["experiment"] / f"{below['id']}.json"
        if file.exists():
            _repeat(read_record(file), results, setting, elsewhere)
    trainer = setting["trainer"] | {name: record[name] for name in ("threads", "precision") if name in record}
    return ensure(run_of(record, setting | {"trainer": trainer}, elsewhere))


def alike(name: str, old: Any, new: Any) -> bool:
    """Whether two values of a metric agree as well as two machines do; of curves, the last points."""
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and (not old or alike(name, old[-1], new[-1]))
    if old is None or new is None:
        return old is new
    allowed = POINTS if name.startswith(("test/accuracy", "validation/accuracy")) else RELATIVE * abs(old) + ROUNDING
    return bool(abs(new - old) <= allowed)


def _short(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value
