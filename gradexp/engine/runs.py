"""Runs: one resolved config, one id, one record.

The record is written last and atomically, so its presence means that the run is finished. Nothing here
imports torch: tables and plans read records in milliseconds.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gradexp.base.errors import UserError, nearest
from gradexp.base.files import draft_of, intact, remove_sealed
from gradexp.base.files import sha256 as sha256
from gradexp.base.files import write_atomically as write_atomically
from gradexp.engine import clocks, schema
from gradexp.engine.registry import check_targets, locate

Config = dict[str, Any]
DEFAULT_DATA = "data"  # as in conf/config.yaml; the only data root that need not exist
ROOT = Path(__file__).resolve().parents[2]

# What changes only where and how a run is executed is not part of its identity.
HARDWARE = ("paths", "trainer", "logger", "launcher", "gradients", "objective")
RECORD_LIMIT = 64 * 1024  # bytes; longer curves go to a compressed file beside the record
LOADED = "GRADEXP_COMMIT"  # in the environment: the commit whose code a server of processes has loaded
REMADE = "remade.json"  # in a run's folder: the numbers in which what is there differs from the run's record
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")


# --- identity ---------------------------------------------------------------------------------------------


def identity(config: Config) -> Config:
    """The part of a config that decides its numbers.

    Null values and terms of weight 0 are left out: a switch added later enters with null as "as before",
    and keeps old records valid. Of the scale only the name counts: its settings are already where they act.
    1 and 1.0 are one number.
    """
    kept = {key: value for key, value in config.items() if key not in HARDWARE}
    upstream = {name: identity(run) for name, run in config["upstream"].items()}
    return _canonical(kept | {"scale": config["scale"]["name"], "upstream": upstream})


def run_id(config: Config) -> str:
    """Twelve hexadecimal digits that name a run."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _canonical(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if not (isinstance(item, dict) and item.get("weight") == 0)}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# --- places -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """Where data, records and rebuildable outputs live; relative paths start at the repository."""

    data: Path
    results: Path
    outputs: Path

    @classmethod
    def of(cls, config: Config) -> Paths:
        """The places that a config names. Raises UserError for a data root that is named but not there."""
        places = {name: ROOT / Path(value).expanduser() for name, value in config["paths"].items()}
        if config["paths"]["data"] != DEFAULT_DATA and not places["data"].is_dir():
            raise UserError(
                f"paths.data={config['paths']['data']}: there is no such folder. Name the one that holds the data sets "
                f"(GRADEXP_DATA=FOLDER or paths.data=FOLDER), or create it, and they are downloaded into it"
            )
        return cls(**places)

    def record(self, config: Config) -> Path:
        return self.results / "runs" / config["name"] / f"{run_id(config)}.json"

    def folder(self, config: Config) -> Path:
        """Checkpoint, weights and logs of a run: all of it can be deleted and rebuilt."""
        return self.outputs / "runs" / config["name"] / run_id(config)

    @property
    def cache(self) -> Path:
        return self.outputs / "cache"


@dataclass(frozen=True)
class Planned:
    """A run before it runs: what to type, its resolved config, and the runs it stands on."""

    overrides: tuple[str, ...]
    config: Config
    upstream: tuple[Planned, ...]

    @cached_property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def command(self) -> str:
        return shlex.join(["python", "run.py", *self.overrides])


# --- records ----------------------------------------------------------------------------------------------


def read_record(path: Path) -> Config:
    """A record, its curves included even where they were moved to the compressed file beside it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "curves_file" in record:
            curves = gzip.decompress((path.parent / record["curves_file"]).read_bytes())
            record["metrics"] |= json.loads(curves)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise _unreadable(path, str(error)) from None
    if wrong := schema.faults(record, complete=False):
        raise _unreadable(path, wrong[0])
    return record


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"record {path} can't be read ({why}); delete it and run again, or restore it with git")


def metric_of(record: Config, name: str) -> float | list[float | None]:
    """A recorded number, or a curve; NaN for a number that a diverged run has not. Raises UserError for an unknown name."""
    metrics = record["metrics"]
    if name not in metrics and record["status"] != "diverged":
        raise UserError(f"record {record['id']} has no metric {name}{nearest(name, metrics)}")
    value: list[float | None] | float | None = metrics.get(name)
    return float("nan") if value is None else value


def value_of(record: Config, name: str) -> float:
    """A recorded number, as metric_of. Raises UserError for a curve."""
    value = metric_of(record, name)
    if isinstance(value, list):
        raise UserError(f"record {record['id']}: {name} is a curve, where a number is wanted")
    return float(value)


def write_record(path: Path, record: Config) -> None:
    """Writes a record: sorted keys, two-space indent, NaN as null, under 64 KiB."""
    content = _json(record)
    if len(content) > RECORD_LIMIT:
        curves = {name: value for name, value in record["metrics"].items() if isinstance(value, list)}
        curves_file = path.with_name(f"{path.stem}.curves.json.gz")
        write_atomically(curves_file, gzip.compress(_json(curves), mtime=0))
        numbers = {name: value for name, value in record["metrics"].items() if name not in curves}
        content = _json({**record, "metrics": numbers, "curves_file": curves_file.name})
    write_atomically(path, content)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the record at `path`. Raises UserError where they are missing or are not the record's."""
    facts = read_record(path).get("arrays", {})
    file = path.with_suffix(".npz")
    if not file.exists() or sha256(file) != facts.get("sha256"):
        raise UserError(f"{file} is missing or is not what {path.name} describes; delete both and run again")
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Config:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())
    return {"sha256": sha256(path), "shapes": {name: list(array.shape) for name, array in arrays.items()}}


def _json(value: Any) -> bytes:
    text = json.dumps(_finite(value), sort_keys=True, indent=2, allow_nan=False)
    flat = re.sub(
        r"\[\n[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
    return (flat + "\n").encode()  # a list of numbers stays on one line


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- runs -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a task returns.

    metrics: a flat dict of numbers, curves as lists. facts: whatever else the record should hold
    (data fingerprint, parameters, device, precision, images_per_second). arrays: images and maps that a figure
    shows; they are kept compressed beside the record, so a figure renders from results alone. Keep them small.
    """

    metrics: dict[str, float | list[float]]
    status: str = "finished"
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Run:
    """One run: its config, its places, the runs it stands on, and the seconds that went into doing (or awaiting) these."""

    config: Config
    paths: Paths
    used: dict[str, Any] = field(default_factory=dict)
    upstream_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(clocks.CLOCKS, 0.0))
    data: Config | None = None  # fingerprints of the images that it uses, once they are known

    @property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def record_path(self) -> Path:
        return self.paths.record(self.config)

    @property
    def folder(self) -> Path:
        return self.paths.folder(self.config)

    @property
    def weights(self) -> Path:
        """The trained parameters, as written by the train task."""
        return self.folder / "weights.pt"

    @property
    def checkpoint(self) -> Path:
        """The state of a training that is not done yet."""
        return self.folder / "last.ckpt"

    @property
    def pieces(self) -> Path:
        """The folder of what a run that trains nothing has done so far (gradexp.engine.pieces)."""
        return self.folder / "pieces"

    def record(self) -> Config | None:
        return read_record(self.record_path) if self.record_path.exists() else None

    def uses(self, data: Config) -> None:
        """Notes the fingerprints of the images that the run is about to use.

        Raises UserError where it has a record (its files are made again) that was made with other images.
        """
        self.data = data
        if record := self.record():
            _check_images(data, record)

    def upstream(self, name: str, product: str = "weights.pt") -> Run:
        """The finished run that this config calls `name`, the file that it makes at hand; done first where missing.

        Raises UserError where it used other images of the data set that this run uses.
        """
        config = self.config["upstream"][name]
        shared = {key: self.config[key] for key in HARDWARE if key in self.config}
        run = Run(config | shared, self.paths)
        made = run.folder / product
        begun = clocks.read()
        record = ensure(run, needs=lambda: intact(made))
        if self.data:
            _check_images(self.data, record)
        self.upstream_seconds = {clock: spent + self.upstream_seconds[clock] for clock, spent in clocks.since(begun).items()}
        again = run.folder / REMADE
        facts = json.loads(again.read_text(encoding="utf-8")) if again.exists() else {}
        self.used[name] = {"id": run.id, "experiment": config["name"], f"{made.stem}_sha256": sha256(made)} | facts
        return run


def _check_images(ours: Config, record: Config) -> None:
    if split := differing_split(ours, record.get("data", {})):
        raise UserError(
            f"the {split} images of {ours['name']} are not those of {record['experiment']} {record['id']} (fingerprint "
            f"{ours[split]}, there {record['data'][split]}): use the data root that it was made with (paths.data=FOLDER), or "
            f"delete its record and its folder of outputs to make it again from these images"
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


def digests(upstream: Config) -> dict[str, str]:
    """{name: digest of the file that was used} of the runs that one stands on, as in `Run.used` and a record's `upstream`."""
    return {name: value for name, used in upstream.items() for key, value in used.items() if key.endswith("_sha256")}


def ensure(run: Run, needs: Callable[[], bool] = lambda: True) -> Config:
    """The record of a run; the work is done only when the record, or what the caller `needs`, is missing.

    A run whose record exists but whose files were deleted is done again; its record stays as it was.
    """
    record = run.record()
    if record and needs() and not (run.checkpoint.exists() or run.pieces.exists()):
        return record
    with _locked(run):
        record = run.record()
        if record and needs():
            _tidy(run)
            return record
        if record:
            print(f"{run.config['name']} {run.id}: its record is here, its files are not: doing it again "
                  f"(took {record['seconds']['wall'] / 60:.0f} min)", flush=True)  # fmt: skip
        else:
            _writable(run.record_path)
        fresh = _perform(run)
        if record:
            _compare(run, record, _finite(fresh))
            _tidy(run)
            return record
        if wrong := schema.faults(_finite(fresh), complete=True):
            raise ValueError(f"{run.config['name']} {run.id} made no valid record: {'; '.join(wrong)}")
        for draft in run.record_path.parent.glob(f".{run.record_path.name}.*"):
            draft.unlink()  # of a process that died while it wrote; this one holds the lock
        write_record(run.record_path, fresh)
        _tidy(run)
        return read_record(run.record_path)


def _writable(record: Path) -> None:
    """Raises OSError where no record can be written: before the work, not after it."""
    draft = draft_of(record)
    draft.touch()
    draft.unlink()


def _tidy(run: Run) -> None:
    """Removes what only an unfinished run needs, drafts of processes that died too."""
    remove_sealed(run.checkpoint)
    for draft in run.checkpoint.parent.glob(f".{run.checkpoint.name}.*"):
        draft.unlink()
    shutil.rmtree(run.pieces, ignore_errors=True)


def _perform(run: Run) -> Config:
    started, begun = datetime.now(UTC), clocks.read()
    git = git_state()
    check_targets(run.config)
    result: Result = locate(run.config["task"]["_target_"], "task")(run)
    spent = {clock: seconds - run.upstream_seconds[clock] for clock, seconds in clocks.since(begun).items()}
    earlier = result.facts.pop("earlier_seconds", {"wall": 0.0, "cpu": 0.0})
    arrays = run.record_path.with_suffix(".npz")
    if result.arrays and not (run.record_path.exists() and arrays.exists()):  # a record that is there stays as it is
        result.facts["arrays"] = _write_arrays(arrays, result.arrays)
    return {
        "id": run.id,
        "experiment": run.config["name"],
        "scale": run.config["scale"]["name"],
        "seed": run.config["seed"],
        "status": result.status,
        "metrics": result.metrics,
        "config": {key: value for key, value in run.config.items() if key != "paths"},
        "upstream": run.used,
        "seconds": {clock: round(spent[clock] + earlier[clock], 2) for clock in clocks.CLOCKS}
        | {"upstream": round(run.upstream_seconds["wall"], 2)},
        "peak_memory_mib": clocks.peak_memory_mib(),
        "versions": versions(),
        "git": git,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **result.facts,
    }


def _compare(run: Run, record: Config, fresh: Config) -> None:
    """Says how a run that was done again differs from its record: another machine rounds otherwise.

    Those that stand on what it left now note its numbers in their own records, or that its files are others.
    """
    differing = {name: value for name, value in fresh["metrics"].items() if record["metrics"].get(name) != value}
    changed = {name: value for name, value in differing.items() if not isinstance(value, list)}
    listed = ", ".join(f"{name} {record['metrics'].get(name)} -> {value}" for name, value in changed.items())
    # Two trainings may end at one accuracy by chance: their curves tell them apart. What has no curve has digests.
    files = any(fresh.get(what) != record.get(what) for what in ("sha256", "upstream"))
    way = ", by other curves" if differing else ", from other files" if files else ""
    print(f"rebuilt {run.config['name']} {run.id}: {listed or f'same numbers as its record{way}'}", flush=True)
    if way:
        write_atomically(run.folder / REMADE, _json({"remade": changed}))
    else:
        (run.folder / REMADE).unlink(missing_ok=True)


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """One worker a run. The operating system frees the lock of a worker that dies, however it dies."""
    path = run.paths.outputs / "locks" / f"{run.id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, poll_interval=0.5)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{run.config['name']} {run.id}: another worker is at it; waiting for its record", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- where a record comes from ----------------------------------------------------------------------------


def git_state() -> dict[str, Any]:
    """The commit, and whether code or config differ from it (results do not count).

    A process that was forked from a server has the code of when that was started, whose commit the environment names.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!results")
    moved = os.environ.get(LOADED, commit) != commit
    return {"commit": commit or None, "dirty": bool(changes) or moved if commit else None}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def objective(record: Config, direction: str) -> float | None:
    """What a sweeper is told: the metric that the config calls `objective`; the worst value where training diverged.

    direction: `maximize` or `minimize`, the sweeper's; anything else where nobody optimises: a missing metric is then None.
    Raises UserError for a metric that a sweeper needs and the run has not.
    """
    name, metrics = record["config"].get("objective", "test/accuracy"), record["metrics"]
    wanted = direction in ("maximize", "minimize")
    if wanted and (name not in metrics or isinstance(metrics[name], list)):
        numbers = sorted(key for key, value in metrics.items() if not isinstance(value, list))
        raise UserError(f"objective={name}: this run measures {', '.join(numbers)}; set objective to one of them")
    value: float | None = None if isinstance(metrics.get(name), list) else metrics.get(name)
    missing = value is None or not math.isfinite(value)
    return (-math.inf if direction == "maximize" else math.inf) if wanted and missing else value


def say(record: Config) -> None:
    """The last line of a run."""
    numbers = {name: value for name, value in sorted(record["metrics"].items()) if not isinstance(value, list)}
    numbers = {name: value for name, value in numbers.items() if name.startswith("test/")} or numbers
    words = [f"{name}={_short(value)}" for name, value in numbers.items()]
    shown = " ".join(words[:8] + (["..."] if len(words) > 8 else []))
    print(f"run {record['id']} {record['status']}: {shown}", flush=True)
