"""From a run to its record: upstream runs first, one worker at a time, the record last."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import filelock

from gradexp.base.errors import BusyError, UserError
from gradexp.base.files import draft_of, intact, remove_drafts, remove_sealed, sha256, write_atomically
from gradexp.engine import clocks, plugins
from gradexp.engine.build import check_settings, targets
from gradexp.engine.origin import SOURCES, git_state, versions
from gradexp.engine.record import Record, faults, finite, judged, read_record, write_arrays, write_record
from gradexp.engine.run import Run, Settings, hardware
from gradexp.engine.task import Finished, Task, Upstream, task_of

WAITING_EVERY = 180.0  # seconds between the lines of a process that waits for another one


def ensure(run: Run, *, product: bool = False, waits: bool = True) -> Record:
    """The record of a run, which is done first where it has none.

    product: whether the file that the run leaves for other runs must exist too. A run whose record exists but whose file was
    deleted is done again, and keeps its record. The record is written last and atomically.
    waits: whether to wait for another process that is doing the run or a run upstream of it; if not, BusyError is raised.
    """
    if (record := usable_record(run, product)) and not (run.checkpoint.exists() or run.pieces.exists()):
        check_settings(hardware(run.config))  # it decides nothing here, but a mistake in it is told
        _note_changes(run, record)
        return record
    with _locked(run, waits):
        if not usable_record(run, product):
            _do(run, waits)
        # What only an unfinished run needs; drafts are those of killed attempts, as this process holds the lock.
        remove_sealed(run.checkpoint)
        for path in (run.checkpoint, run.record_path):
            remove_drafts(path, 0)
        shutil.rmtree(run.pieces, ignore_errors=True)
        return read_record(run.record_path)


def _note_changes(run: Run, record: Record) -> None:
    """Says where code of the user's own has changed since the record was made; that of gradexp has versions."""
    known, built = record.get("sources", {}), [node["_target_"] for _, node in targets(run.config)]
    used = [name for name in plugins.packages() if any(target.startswith(f"{name}.") for target in built)]
    if changed := [name for name in used if known.get(name, SOURCES.get(name)) != SOURCES.get(name)]:
        print(f"{run.name} {run.id}: answered from its record, and {', '.join(changed)} has changed since; to do it again, "
              f"delete {run.record_path}, or give what changed a setting of its own (docs/extend.md)", flush=True)  # fmt: skip


def _do(run: Run, waits: bool) -> None:
    """Does a run, its upstream runs first, and writes its record, or compares with the one that it has."""
    record = run.record()
    if record:
        minutes = record["seconds"]["wall"] / 60
        print(f"{run.name} {run.id}: the record exists but its files were deleted, damaged or replaced by those of another "
              f"run; running it again (took {minutes:.0f} min)", flush=True)  # fmt: skip
    else:  # raises OSError where no record can be written: before the work, not after it
        draft = draft_of(run.record_path)
        draft.touch()
        draft.unlink()
    check_settings(run.config)
    task = task_of(run.config)
    for name, below in run.upstream.items():
        if not task_of(below.config).product:
            raise UserError(f"upstream.{name}: runs of experiment {below.name} leave no file for other runs")
    task.check(run)
    upstream = Settings({name: finish(below, waits) for name, below in run.upstream.items()}, run.upstream.missing)
    fresh = _execute(run, task, upstream)
    if task.product:
        signature = {"run": run.id, "sha256": sha256(run.folder / task.product)}
        write_atomically(_signature(run.folder / task.product), json.dumps(signature).encode())
    if record:
        _compare(run, record, finite(fresh))
    else:
        write_record(run.record_path, fresh)


def finish(run: Run, waits: bool = True) -> Finished:
    """An upstream run with its record and product; it is done, or done again, where one of them is missing."""
    return Finished(run, ensure(run, product=True, waits=waits), run.folder / task_of(run.config).product)


def usable_record(run: Run, product: bool) -> Record | None:
    """The record, if it exists, and with it the product where that is needed."""
    record = run.record()
    file = task_of(run.config).product if product else ""
    return record if record and (not file or is_product(run.folder / file, record)) else None


def is_product(file: Path, record: Record) -> bool:
    """Whether a file is what the run of a record left for other runs: it exists, is intact and not that of another run.

    A file beside it names its run. Before 2026-11-29 it had none, and the record decides.
    """
    if not intact(file):
        return False
    digest, signature = sha256(file), _signature(file)
    if signature.exists():
        try:
            return bool(json.loads(signature.read_text(errors="replace")) == {"run": record["id"], "sha256": digest})
        except ValueError:
            return False
    return bool(record.get("product", {}).get("sha256", digest) == digest)


def _signature(product: Path) -> Path:
    return product.with_name(f"{product.name}.run.json")


def _execute(run: Run, task: Task, upstream: Upstream) -> Record:
    """Does the work. Returns the new record; raises ValueError where it is not a valid one."""
    started, begun, git = datetime.now(UTC), clocks.read(), git_state()
    result = task(run, upstream)
    spent = clocks.since(begun)
    used = {
        name: {"id": below.run.id, "experiment": below.run.name, f"{below.product.stem}_sha256": below.digest}
        | ({"data": below.record["data"]} if "data" in below.record else {})  # fingerprints of its images
        for name, below in upstream.items()
    }
    earlier = result.facts.pop("earlier_seconds", dict.fromkeys(clocks.CLOCKS, 0.0))
    if result.arrays and not (run.finished and run.record_path.with_suffix(".npz").exists()):  # a record stays as it is
        result.facts["arrays"] = write_arrays(run.record_path.with_suffix(".npz"), result.arrays)
    record = {
        "id": run.id,
        "experiment": run.name,
        "scale": run.config["scale"]["name"],
        "seed": run.config["seed"],
        **({"command": run.recorded_command} if run.recorded_command else {}),
        "status": result.status,
        "metrics": judged(result.metrics, run.config),
        "config": {key: value for key, value in run.config.items() if key != "paths"},
        "upstream": used,
        "seconds": {clock: round(spent[clock] + earlier[clock], 2) for clock in clocks.CLOCKS},
        "peak_memory_mib": clocks.peak_memory_mib(),
        "versions": versions(),
        "git": git,
        "sources": SOURCES,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"product": {"file": task.product, "sha256": sha256(run.folder / task.product)}} if task.product else {}),
        **result.facts,
    }
    if wrong := faults(finite(record)):
        raise ValueError(f"{run.name} {run.id} made an invalid record: {'; '.join(wrong)}")
    return cast(Record, record)


def _compare(run: Run, record: Record, fresh: Record) -> None:
    """Prints how a run that was done again differs from its record, as it may on another machine."""
    old, new = record["metrics"], fresh["metrics"]
    differing = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    numbers = [f"{name} {old.get(name)} -> {new.get(name)}" for name in differing if not isinstance(new.get(name), list)]
    # Two different trainings may end at the same accuracy by chance; their curves or digests differ.
    files = any(fresh.get(what) != record.get(what) for what in ("sha256", "upstream", "product") if what in record)
    note = ", by other curves" if differing else ", from other files" if files else ""
    print(f"rebuilt {run.name} {run.id}: {', '.join(numbers) or f'same numbers as its record{note}'}", flush=True)


@contextmanager
def _locked(run: Run, waits: bool = True) -> Iterator[None]:
    """Holds the lock of the run's folder of outputs, and that of its record until this is written.

    Several checkouts may share a folder of results, and each then has outputs of its own.
    """
    with ExitStack() as locks:
        locks.enter_context(_holding(run.paths.outputs / "locks" / f"{run.id}.lock", run, waits))
        if not run.finished:
            locks.enter_context(_holding(run.paths.results / "runs" / ".locks" / f"{run.id}.lock", run, waits))
        yield


@contextmanager
def _holding(path: Path, run: Run, waits: bool) -> Iterator[None]:
    """Holds a lock, which the operating system releases when the process ends, however it ends.

    The file names the process that holds it. One that waits prints this, first and every few minutes. Raises BusyError if the
    lock is held and `waits` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, patience = filelock.FileLock(path, poll_interval=0.5), 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except filelock.Timeout:
            holder = path.read_text(errors="replace").strip() or "another process"
            if not waits:
                raise BusyError(f"{run.name} {run.id}: left to {holder}, which is doing this run") from None
            print(f"{run.name} {run.id}: waiting for {holder}, which is doing this run", flush=True)
            patience = WAITING_EVERY
    try:
        path.write_text(f"process {os.getpid()} on host {platform.node()}\n")
        yield
    finally:
        lock.release()
