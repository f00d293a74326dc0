"""Whether the records are what the code of today would write."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradexp.base.errors import UserError
from gradexp.engine import record as records
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import differing_split, ensure
from gradexp.engine.hardware import native_bf16
from gradexp.engine.record import read_arrays, read_record
from gradexp.engine.registry import locate, targets
from gradexp.engine.run import Config, Paths, Run, run_id

# What two machines, which round otherwise, may differ by: points of accuracy; relative, of anything else.
POINTS, RELATIVE = 2.0, 0.02


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a record, and how to fix it."""

    record: Path
    what: str


def verify(paths: Paths, *, sample: int, seed: int, extra: Config) -> Iterator[Finding | str]:
    """Checks every record, then repeats `sample` quick ones; yields what is wrong, and lines that tell of progress.

    extra: the trainer, logger and gradients of the repeats.
    """
    files = sorted((paths.results / "runs").glob("*/*.json"))
    good: list[Path] = []
    for file in files:
        wrong = list(examine(file))
        yield from (Finding(file, what) for what in wrong)
        good += [] if wrong else [file]
    yield f"{len(good)} of {len(files)} records: complete, digests and ids as they should be"
    quick = [file for file in good if read_record(file)["scale"] == "quick"]
    able = [file for file in quick if read_record(file).get("precision") != "bf16" or native_bf16("cpu")]
    if sample and len(able) < len(quick):
        yield f"{len(quick) - len(able)} quick records are in bf16, which this processor does not compute: not repeated here"
    for file in random.Random(seed).sample(able, min(sample, len(able))):
        wrong = list(repeat(file, paths, extra))
        yield from (Finding(file, what) for what in wrong)
        if not wrong:
            yield f"{file.parent.name} {file.stem}: repeated, the same numbers"


def examine(file: Path) -> Iterator[str]:
    """What is wrong with one record, without repeating it."""
    try:
        record = read_record(file)
        if "arrays" in record:
            read_arrays(file)
    except UserError as error:
        yield str(error)
        return
    if faults := records.faults(record, complete=True):
        yield from faults
        return
    if record.get("id") != file.stem:
        yield f"its id is {record.get('id')}, its file's name another; rename it back, or delete it"
        return
    try:
        named, outdated = run_id(record["config"]), list(_outdated(record["config"]))
    except (KeyError, TypeError, AttributeError) as error:
        yield f"its config is no run's config any more ({error}); delete it"
        return
    yield from outdated
    if named != record["id"]:
        yield f"its config has the id {named}: the record was changed, or ids are made otherwise now; delete it and run again"
    for name, upstream in record["upstream"].items():
        nested = record["config"]["upstream"].get(name)
        if nested is None or run_id(nested) != upstream["id"]:
            yield f"its upstream {name} is not the run that its config names; delete it and run again"
        with suppress(UserError):  # of a record that is not there, or is found wrong by itself
            other = read_record(file.parents[1] / upstream.get("experiment", "") / f"{upstream['id']}.json")
            if split := differing_split(record.get("data", {}), other.get("data", {})):
                yield f"its upstream {name}, {upstream['id']}, used other {split} images; delete the wrong one and run it again"


def _outdated(config: Config) -> Iterator[str]:
    """What of a config the code of today does not know or does otherwise."""
    for where, target in targets({key: value for key, value in config.items() if key != "upstream"}):
        try:
            locate(target, where)
        except UserError as error:
            yield f"its config no longer resolves: {error}"
    try:
        today = compose_run([f"experiment={config['name']}", f"scale={config['scale']['name']}"])["task"]
    except UserError as error:
        yield f"its config no longer resolves: {error}"
        return
    was, now = config["task"].get("version"), today.get("version")
    if was != now:
        yield f"the task's version of {config['name']} is {was}, today's {now}: tables no longer count it; run it again"
    for upstream in config["upstream"].values():
        yield from _outdated(upstream)


def repeat(file: Path, paths: Paths, extra: Config) -> Iterator[str]:
    """Does a run again from nothing, upstream runs included, and compares fingerprints and numbers."""
    record = read_record(file)
    with tempfile.TemporaryDirectory(prefix="gradexp-verify-") as folder:
        places = Paths(data=paths.data, results=Path(folder) / "results", outputs=Path(folder) / "outputs")
        try:
            fresh = _again(record, paths, places, extra)
        except UserError as error:
            yield f"it can't be repeated: {error}"
            return
    if fresh.get("data") != record.get("data"):
        yield f"other data: {json.dumps(record.get('data'))}, now {json.dumps(fresh.get('data'))}"
    if fresh["status"] != record["status"]:
        yield f"it {record['status']}, now it {fresh['status']}"
    for name, old in record["metrics"].items():
        new = fresh["metrics"].get(name)
        if not alike(name, old, new):
            yield f"{name} was {_short(old)}, now it is {_short(new)}"


def _again(record: Config, paths: Paths, places: Paths, extra: Config) -> Config:
    """Repeats the upstream runs of a record below `places`, then its own, each with the threads and precision it had.

    Sums are rounded by how they are shared out: with another number of threads a training ends elsewhere.
    """
    for below in record["upstream"].values():
        file = paths.results / "runs" / below["experiment"] / f"{below['id']}.json"
        if file.exists():
            _again(read_record(file), paths, places, extra)
    trainer = extra["trainer"] | {name: record[name] for name in ("threads", "precision") if name in record}
    named = {"data": str(paths.data), "results": str(places.results), "outputs": str(places.outputs)}
    return ensure(Run({**record["config"], **extra, "trainer": trainer, "paths": named}, places))


def alike(name: str, old: Any, new: Any) -> bool:
    """Whether two values of a metric agree as well as two machines do. Curves: their last points."""
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and (not old or alike(name, old[-1], new[-1]))
    if old is None or new is None:
        return old is new
    allowed = POINTS if name.startswith("test/accuracy") else RELATIVE * max(1, abs(old))
    return bool(abs(new - old) <= allowed)


def _short(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value
