"""Checks records: whether they are valid, agree with the code of today, and repeat."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradexp.base.errors import UserError
from gradexp.engine.build import locate, targets
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure, is_product
from gradexp.engine.hardware import native_bf16
from gradexp.engine.known import run_of
from gradexp.engine.origin import SOURCES
from gradexp.engine.record import differing_split, read_arrays, read_record
from gradexp.engine.run import Config, Paths, Run, record_files, run_id
from gradexp.engine.task import task_of

# How much two machines, which round differently, may differ by: percentage points of accuracy; relative for other metrics.
POINTS, RELATIVE = 2.0, 0.02
LISTED = 5  # ids in a note
# The run that verification does for itself; with its teacher it takes seconds.
OWN = ["experiment=jacobian_distill", "method=ce_a_j", "scale=quick", "scale.width=0.04", "data.per_class=3", "optim.passes=2"]
OWN += ["+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.04"]


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
        wrong = list(examine(file, replace(paths, results=file.parents[2])))
        yield from (Finding(file, what) for what in wrong)
        good += [] if wrong else [file]
    yield f"{len(good)} of {len(files)} records: complete, with correct digests and ids"
    yield from notes(good)
    quick = [file for file in good if read_record(file)["scale"] == "quick"]
    if len(quick) < len(good):
        yield f"{len(good) - len(quick)} records are not repeated: only those at scale=quick take seconds"
    repeatable = [file for file in quick if read_record(file).get("precision") != "bf16" or native_bf16("cpu")]
    if sample and len(repeatable) < len(quick):
        yield f"{len(quick) - len(repeatable)} quick records are not repeated: this processor has no bf16 arithmetic"
    for file in random.Random(seed).sample(repeatable, min(sample, len(repeatable))):
        wrong = list(repeat(file, paths, extra))
        yield from (Finding(file, what) for what in wrong)
        if not wrong:
            yield f"{file.parent.name} {file.stem}: repeated, the same numbers"


def examine(file: Path, paths: Paths) -> Iterator[str]:
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
    for name, upstream in record["upstream"].items():
        nested = record["config"]["upstream"].get(name)
        if nested is None or run_id(nested) != upstream["id"]:
            yield f"its upstream {name} is not the run that its config names; delete it and run again"
        with suppress(UserError):  # the upstream record is missing, or wrong itself
            other = read_record(file.parents[1] / upstream.get("experiment", "") / f"{upstream['id']}.json")
            if split := differing_split(record.get("data", {}), other.get("data", {})):
                yield f"its upstream {name}, {upstream['id']}, used other {split} images; delete the wrong one and run it again"
    folder = paths.outputs / "runs" / record["experiment"] / record["id"]
    product = "" if outdated else task_of(record["config"]).product
    if product and (folder / product).exists() and not is_product(folder / product, record):
        yield f"{folder / product} is damaged or of another run; delete {folder}"


def _outdated(config: Config) -> Iterator[str]:
    """What of a config the code of today does not have, or does differently."""
    for where, node in targets({key: value for key, value in config.items() if key != "upstream"}):
        try:
            locate(node["_target_"], where)
        except UserError as error:
            yield f"its config no longer resolves: {error}"
    try:
        today = compose_run([f"experiment={config['name']}", f"scale={config['scale']['name']}"])["task"]
    except UserError as error:
        yield f"its config no longer resolves: {error}"
    else:
        was, now = config["task"].get("version"), today.get("version")
        if was != now:
            yield f"the task's version of {config['name']} is {was}, today's {now}: tables no longer count it; run it again"
    for upstream in config["upstream"].values():
        yield from _outdated(upstream)


def notes(files: Sequence[Path]) -> Iterator[str]:
    """What a reader of these records should know, though nothing is wrong: by which sources they were computed."""
    dated = {file.stem: record["sources"] for file in files if "sources" in (record := read_record(file))}
    if len(dated) < len(files):
        yield f"{len(files) - len(dated)} records do not state by which sources they were computed: they are older"
    changed: dict[str, list[str]] = {}
    for name, sources in dated.items():
        packages = [package for package, digest in SOURCES.items() if sources.get(package, digest) != digest]
        if packages:
            changed.setdefault(", ".join(packages), []).append(name)
    for of, names in changed.items():
        listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
        yield f"{len(names)} records were computed by other sources of {of} than today's: {listed}"


def repeat_own(paths: Paths, setting: Config) -> Iterator[Finding | str]:
    """Does a tiny student and its teacher twice from nothing, and compares numbers and weights to the bit."""
    records = []
    for _ in range(2):
        with tempfile.TemporaryDirectory(prefix="gradexp-verify-") as folder:
            elsewhere = Paths(paths.data, Path(folder) / "results", Path(folder) / "outputs")
            run = compose_run(OWN) | setting
            trainer = setting["trainer"] | {"threads": 1, "strict": True}
            records.append(ensure(Run(run | {"trainer": trainer}, elsewhere)))
    first, second = records
    differing = [name for name in ("metrics", "upstream", "product", "data") if first[name] != second[name]]
    if differing:
        yield Finding(Path(first["experiment"]) / first["id"], f"two runs of {' '.join(OWN)} differ in {', '.join(differing)}")
    else:
        yield f"a tiny student and its teacher, done twice: the same numbers and weights ({' '.join(OWN)})"


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


def _repeat(record: Config, results: Path, setting: Config, elsewhere: Paths) -> Config:
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
    allowed = POINTS if name.startswith("test/accuracy") else RELATIVE * max(1, abs(old))
    return bool(abs(new - old) <= allowed)


def _short(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value
