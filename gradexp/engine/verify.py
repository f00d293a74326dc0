"""Checks records: whether they are valid, agree with the code of today, and repeat."""

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
from gradexp.engine.known import run_of
from gradexp.engine.record import read_arrays, read_record
from gradexp.engine.registry import locate, targets
from gradexp.engine.run import Config, Paths, run_id

# How much two machines, which round differently, may differ by: percentage points of accuracy; relative for other metrics.
POINTS, RELATIVE = 2.0, 0.02


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a record, and how to fix it."""

    record: Path
    what: str


def verify(paths: Paths, *, sample: int, seed: int, extra: Config) -> Iterator[Finding | str]:
    """Checks every record, then repeats `sample` quick ones. Yields what is wrong, and lines about progress.

    extra: the trainer, logger and gradients of the repeats.
    """
    files = sorted((paths.results / "runs").glob("*/*.json"))
    good: list[Path] = []
    for file in files:
        wrong = list(examine(file))
        yield from (Finding(file, what) for what in wrong)
        good += [] if wrong else [file]
    yield f"{len(good)} of {len(files)} records: complete, with correct digests and ids"
    quick = [file for file in good if read_record(file)["scale"] == "quick"]
    repeatable = [file for file in quick if read_record(file).get("precision") != "bf16" or native_bf16("cpu")]
    if sample and len(repeatable) < len(quick):
        yield f"{len(quick) - len(repeatable)} quick records are not repeated: this processor has no bf16 arithmetic"
    for file in random.Random(seed).sample(repeatable, min(sample, len(repeatable))):
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
        yield f"its id is {record.get('id')}, which is not the name of its file; rename the file, or delete it"
        return
    try:
        computed, outdated = run_id(record["config"]), list(_outdated(record["config"]))
    except (KeyError, TypeError, AttributeError) as error:
        yield f"its config is not that of a run ({error}); delete it"
        return
    yield from outdated
    if computed != record["id"]:
        yield f"its config has the id {computed}: the record or the rule for ids was changed; delete it and run again"
    for name, upstream in record["upstream"].items():
        nested = record["config"]["upstream"].get(name)
        if nested is None or run_id(nested) != upstream["id"]:
            yield f"its upstream {name} is not the run that its config names; delete it and run again"
        with suppress(UserError):  # the upstream record is missing, or wrong itself
            other = read_record(file.parents[1] / upstream.get("experiment", "") / f"{upstream['id']}.json")
            if split := differing_split(record.get("data", {}), other.get("data", {})):
                yield f"its upstream {name}, {upstream['id']}, used other {split} images; delete the wrong one and run it again"


def _outdated(config: Config) -> Iterator[str]:
    """What of a config the code of today does not have, or does differently."""
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
        elsewhere = Paths(paths.data, Path(folder) / "results", Path(folder) / "outputs")
        try:
            fresh = _repeat(record, paths.results, extra, elsewhere)
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
    named = {name: str(getattr(elsewhere, name)) for name in ("data", "results", "outputs")}
    return ensure(run_of(record, setting | {"trainer": trainer, "paths": named}, elsewhere))


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
