"""From a run to its record: upstream runs first, one worker at a time, the record last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import filelock

from gradexp.base.errors import UserError
from gradexp.base.files import draft_of, intact, remove_sealed, sha256
from gradexp.engine import clocks
from gradexp.engine.build import check_settings
from gradexp.engine.origin import git_state, versions
from gradexp.engine.record import faults, finite, read_record, write_arrays, write_record
from gradexp.engine.registry import check_targets
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Finished, Task, Upstream, task_of


def ensure(run: Run, *, product: bool = False) -> Config:
    """The record of a run; the work is done only where the record is missing.

    product: whether the file that the run leaves for others must be there too. A run whose record exists but whose files
    were deleted is done again; its record stays as it was. The record is written last and atomically.
    """
    if (record := _known(run, product)) and not (run.checkpoint.exists() or run.pieces.exists()):
        return record
    with _locked(run):
        if record := _known(run, product):
            _tidy(run)
            return record
        if record := run.record():
            print(f"{run.name} {run.id}: the record exists but its files were deleted; running it again "
                  f"(took {record['seconds']['wall'] / 60:.0f} min)", flush=True)  # fmt: skip
        else:
            _writable(run)
        check_targets(run.config)
        check_settings(run.config)
        task = task_of(run.config)
        for name, below in run.upstream.items():
            if not task_of(below.config).product:
                raise UserError(f"upstream.{name}: runs of experiment {below.name} leave no file for other runs")
        task.check(run)
        fresh = _done(run, task, {name: finish(below) for name, below in run.upstream.items()})
        if record:
            _compare(run, record, finite(fresh))
        else:
            _write(run, fresh)
        _tidy(run)
        return read_record(run.record_path)


def finish(run: Run) -> Finished:
    """An upstream run with its record and product; it is run, or run again, where one of them is missing."""
    return Finished(run, ensure(run, product=True), run.folder / task_of(run.config).product)


def _known(run: Run, product: bool) -> Config | None:
    """The record, where there is one, and the product too where it is asked for."""
    record = run.record()
    return record if record and not (product and not intact(run.folder / task_of(run.config).product)) else None


def _done(run: Run, task: Task, upstream: Upstream) -> Config:
    """Does the work. -> what is recorded of it."""
    started, begun, git = datetime.now(UTC), clocks.read(), git_state()
    result = task(run, upstream)
    spent = clocks.since(begun)
    earlier = result.facts.pop("earlier_seconds", dict.fromkeys(clocks.CLOCKS, 0.0))
    if result.arrays and not (run.finished and run.record_path.with_suffix(".npz").exists()):  # a record stays as it is
        result.facts["arrays"] = write_arrays(run.record_path.with_suffix(".npz"), result.arrays)
    return {
        "id": run.id,
        "experiment": run.name,
        "scale": run.config["scale"]["name"],
        "seed": run.config["seed"],
        **({"command": run.recorded_command} if run.recorded_command else {}),
        "status": result.status,
        "metrics": result.metrics,
        "config": {key: value for key, value in run.config.items() if key != "paths"},
        "upstream": {name: used(below) for name, below in upstream.items()},
        "seconds": {clock: round(spent[clock] + earlier[clock], 2) for clock in clocks.CLOCKS},
        "peak_memory_mib": clocks.peak_memory_mib(),
        "versions": versions(),
        "git": git,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"product": {"file": task.product, "sha256": sha256(run.folder / task.product)}} if task.product else {}),
        **result.facts,
    }


def used(below: Finished) -> Config:
    """The entry of an upstream run in a record: its id, and the digest of the file that was used."""
    return {"id": below.run.id, "experiment": below.run.name, f"{below.product.stem}_sha256": below.digest}


def digests(upstream: Config) -> dict[str, str]:
    """{name: digest of the file that was used} of a record's `upstream`."""
    return {name: value for name, below in upstream.items() for key, value in below.items() if key.endswith("_sha256")}


def _write(run: Run, fresh: Config) -> None:
    if wrong := faults(finite(fresh), complete=True):
        raise ValueError(f"{run.name} {run.id} made an invalid record: {'; '.join(wrong)}")
    for draft in run.record_path.parent.glob(f".{run.record_path.name}.*"):
        draft.unlink()  # of a process that died while it wrote; this one holds the lock
    write_record(run.record_path, fresh)


def _writable(run: Run) -> None:
    """Raises OSError where no record can be written: before the work, not after it."""
    draft = draft_of(run.record_path)
    draft.touch()
    draft.unlink()


def _tidy(run: Run) -> None:
    """Removes what only an unfinished run needs, drafts of processes that died too."""
    remove_sealed(run.checkpoint)
    for draft in run.checkpoint.parent.glob(f".{run.checkpoint.name}.*"):
        draft.unlink()
    shutil.rmtree(run.pieces, ignore_errors=True)


def _compare(run: Run, record: Config, fresh: Config) -> None:
    """Prints how a repeated run differs from its record; another machine rounds differently."""
    differing = {name: value for name, value in fresh["metrics"].items() if record["metrics"].get(name) != value}
    numbers = {name: value for name, value in differing.items() if not isinstance(value, list)}
    listed = ", ".join(f"{name} {record['metrics'].get(name)} -> {value}" for name, value in numbers.items())
    # Two trainings may end at one accuracy by chance: their curves tell them apart. What has no curve has digests.
    files = any(fresh.get(what) != record.get(what) for what in ("sha256", "upstream", "product") if what in record)
    way = ", by other curves" if differing else ", from other files" if files else ""
    print(f"rebuilt {run.name} {run.id}: {listed or f'same numbers as its record{way}'}", flush=True)


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """One worker a run. The operating system frees the lock of a worker that dies, however it dies."""
    path = run.paths.outputs / "locks" / f"{run.id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, poll_interval=0.5)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{run.name} {run.id}: another worker is at it; waiting for its record", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- the same images --------------------------------------------------------------------------------------


def check_images(run: Run, data: Config) -> None:
    """Raises UserError where the run's record, or that of a run it stands on, was made with other images.

    data: fingerprints of the images that the run is about to use.
    """
    for other in (run, *run.upstream.values()):
        record = other.record()
        if record and (split := differing_split(data, record.get("data", {}))):
            raise UserError(
                f"the {split} images of {data['name']} are not those of {other.name} {other.id} (fingerprint {data[split]}, "
                f"there {record['data'][split]}): use the data root that it was made with (paths.data=FOLDER), or delete its "
                f"record and its folder of outputs to make it again from these images"
            )


def differing_split(first: Config, second: Config) -> str | None:
    """`train` or `test`, where two runs used different images of one data set; None where they did not.

    first, second: `data` of records. Where images were held out of the training set, there is no test split to compare.
    """
    if first.get("name") != second.get("name"):
        return None
    held_out = any(data.get("test") == data.get("train") for data in (first, second))
    for split in ("train",) if held_out else ("train", "test"):
        if split in first and split in second and first[split] != second[split]:
            return split
    return None
