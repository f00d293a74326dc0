"""Records: what finished runs leave in results/, checked when they are written and when they are read; ids of runs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import AfterValidator, ConfigDict, StringConstraints, with_config
from typing_extensions import TypedDict

from gradexp.base import typed
from gradexp.base.errors import UserError, nearest
from gradexp.base.files import sha256, write_atomically
from gradexp.base.typed import FileName
from gradexp.engine.build import FORMER, targets

# Where and how a run is executed, which is not part of its identity.
HARDWARE = ("paths", "trainer", "logger", "launcher", "gradients", "objective")
RECORD_LIMIT = 64 * 1024  # bytes; longer curves go to a compressed file beside the record
SEAL = '\n  "record_sha256": "'  # where a record's text has the digest of the rest


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("should name a time zone, as 2026-12-31T23:59:59Z does")
    return text


Metric = float | None | list[float | None]  # null where a number is not finite
RunId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{12}$")]
Moment = Annotated[str, AfterValidator(_moment)]
Config = dict[str, Any]
Clock = Literal["wall", "cpu"]


def _command(text: str) -> str:
    """Raises ValueError for what is no command, or what a terminal would not show as it is."""
    if not text.isprintable() or not shlex.split(text):
        raise ValueError("it is no command")
    return text


Command = Annotated[str, AfterValidator(_command)]
lenient = with_config(ConfigDict(extra="allow", strict=True))  # tasks add facts of their own, and older records have others


def run_id(config: Config) -> str:
    """Twelve hexadecimal digits that name a run."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: Config) -> Config:
    """The part of a config that decides the numbers of its run.

    Null values and terms of weight 0 are left out, so that a setting can be added later with null for the former behaviour
    without changing ids. Of the scale only the name counts, as its settings are interpolated into the other groups.
    1 and 1.0 are the same number. Classes have the names that they had when the first ids were made.
    """
    kept = {key: value for key, value in config.items() if key not in HARDWARE}
    upstream = {name: identity(run) for name, run in config["upstream"].items()}
    return _canonical(kept | {"scale": config["scale"]["name"], "upstream": upstream})


def _canonical(value: Any, name: str = "") -> Any:
    """name: the key of `value`."""
    if isinstance(value, dict):
        kept = {key: _canonical(item, key) for key, item in value.items() if item is not None}
        if "_target_" in kept:
            kept["_target_"] = FORMER.get(kept["_target_"], kept["_target_"])
        if name == "terms":
            return {key: item for key, item in kept.items() if not (isinstance(item, dict) and item.get("weight") == 0)}
        return kept
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


@lenient
class Seconds(TypedDict):  # of the run without its upstream runs
    wall: float
    cpu: float


@lenient
class Git(TypedDict):
    commit: str | None
    dirty: bool | None
    changes: NotRequired[str]  # digest of what the working tree had changed; records before 2026-11-29 lack it


@lenient
class Images(TypedDict, total=False):  # a data set, and fingerprints of the images that were used
    name: str
    train: str
    test: str
    subset: str
    train_images: int
    test_images: int


@lenient
class Used(TypedDict):
    """An upstream run: its id, (NAME_sha256) the digest of its file that was used, and the fingerprints of its images."""

    id: RunId
    experiment: NotRequired[FileName]
    data: NotRequired[Images]  # records before 2026-11-29 lack it
    remade: NotRequired[dict[str, float]]  # metrics of a later training; records until 2026-11-25 have it


@lenient
class Product(TypedDict):  # the file that a run left for other runs
    file: FileName
    sha256: str


@lenient
class ScaleShape(TypedDict):
    name: str


class Target(TypedDict):
    _target_: str


@lenient
class RunShape(TypedDict):
    """What every reader expects of the config in a record; engine.run.RunConfig is what today's configs have."""

    name: FileName
    seed: int
    scale: ScaleShape
    task: Target
    upstream: dict[str, RunShape]


@lenient
class Record(TypedDict):
    """What a finished run leaves in results/runs/."""

    id: RunId
    experiment: FileName
    scale: str
    seed: int
    status: Literal["finished", "diverged"]
    metrics: dict[str, Metric]
    config: dict[str, Any]
    upstream: dict[str, Used]
    seconds: Seconds
    peak_memory_mib: int
    versions: dict[str, Any]
    git: Git
    started: Moment
    ended: Moment
    command: NotRequired[Command]  # hardware and folders aside; records before 2026-11-29 lack it
    data: NotRequired[Images]
    arrays: NotRequired[dict[str, Any]]
    attempts: NotRequired[list[dict[str, Any]]]  # origins of earlier attempts, on other machines or with other code
    curves_file: NotRequired[FileName]
    curves_sha256: NotRequired[str]  # of the compressed file; records before 2026-11-29 lack this and `sources`
    record_sha256: NotRequired[str]  # of the text without this digest; older records lack it, but for committed ones
    sources: NotRequired[dict[str, str]]  # digests of the packages that compute (gradexp.engine.origin)
    device: NotRequired[str]
    devices: NotRequired[int]
    precision: NotRequired[str]
    strict: NotRequired[bool]
    threads: NotRequired[int]
    parameters: NotRequired[int]
    peak_gpu_memory_mib: NotRequired[int]
    steps: NotRequired[int]
    planned_steps: NotRequired[int]  # steps are fewer only where the training diverged; records before 2026-11-29 lack it
    images_per_second: NotRequired[float]
    targets: NotRequired[str]  # of a teacher: `stored` (once; in bfloat16, except logits) or `live` (computed for every batch)
    images: NotRequired[int]  # over which a score is a mean
    labels: NotRequired[list[int]]  # of a gallery's images
    names: NotRequired[list[str]]  # of these classes
    layers: NotRequired[list[str]]
    sha256: NotRequired[dict[str, str]]  # of saliency maps
    product: NotRequired[Product]  # records before 2026-11-29 lack it
    weights_file: NotRequired[dict[str, str]]


def faults(record: Any) -> list[str]:
    """What is wrong with a record in itself, a line each; empty for a valid one."""
    wrong = typed.faults(Record, record)
    if not wrong and record["status"] == "finished" and record.get("steps", 0) < record.get("planned_steps", 0):
        wrong = [f"its training ended after {record['steps']} of {record['planned_steps']} steps"]
    return wrong


def contradictions(record: Record, path: Path) -> list[str]:
    """Where a record contradicts its file name, its config or its upstream runs, a line each."""
    config = record["config"]
    wrong = [f"its config is not that of a run: {fault}" for fault in typed.faults(RunShape, config)]
    wrong += [f"{where}._target_ is no text" for where, node in targets(config) if not isinstance(node["_target_"], str)]
    if wrong:
        return wrong
    computed = run_id(config)
    stated = {"experiment": config["name"], "scale": config["scale"]["name"], "seed": config["seed"]}
    if record["id"] != path.stem:
        wrong.append(f"its id is {record['id']}, which is not the name of its file")
    if record["id"] != computed:
        wrong.append(f"its config has the id {computed}, not {record['id']}")
    for key, value in stated.items():
        if record.get(key) != value:
            wrong.append(f"its {key} is {record.get(key)}, and {value} in its config")
    if path.parent.name != record["experiment"]:
        wrong.append(f"its experiment is {record['experiment']}, which is not the name of its folder")
    for name, below in record["upstream"].items():
        if split := differing_split(record.get("data", {}), below.get("data", {})):
            wrong.append(f"its upstream {name}, {below['id']}, used other {split} images")
    return wrong


def nested(config: Config) -> Iterator[Config]:
    """The config, and those of the upstream runs below it."""
    yield config
    for below in config["upstream"].values():
        yield from nested(below)


def used_digests(upstream: Mapping[str, Used]) -> dict[str, str]:
    """{name: digest of the file that was used} of a record's `upstream`."""
    return {name: str(value) for name, below in upstream.items() for key, value in below.items() if key.endswith("_sha256")}


def differing_split(first: Images, second: Images) -> Literal["train", "test"] | None:
    """The split, `train` or `test`, of which two runs used different images; None where there is none.

    first, second: `data` of records. Where images were held out of the training set, there is no test split to compare.
    """
    if first.get("name") != second.get("name"):
        return None
    held_out = any(data.get("test") == data.get("train") for data in (first, second))
    splits: list[Literal["train", "test"]] = ["train"] if held_out else ["train", "test"]
    for split in splits:
        if split in first and split in second and first[split] != second[split]:
            return split
    return None


def read_record(path: Path) -> Record:
    """A record with its curves, which may be in a compressed file beside it. Do not modify it: it is kept for the next reader.

    Raises UserError where it cannot be read, is not valid, was changed since it was written, or is not the record of the run
    that its name and its folder state.
    """
    try:
        state = path.stat()
        return _parsed(path, state.st_ino, state.st_mtime_ns, state.st_size)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        why = " ".join(str(error).split())
        raise UserError(f"record {path} can't be read ({why}); delete it and run again, or restore it with git") from None


@cache
def _parsed(path: Path, *_state: int) -> Record:
    """A table, its caption and the page read the same records; each state of a file is parsed once in a process."""
    text = path.read_text(encoding="utf-8")
    record: Record = json.loads(text)
    if wrong := faults(record) or contradictions(record, path):
        raise ValueError(wrong[0])
    if "record_sha256" in record and record["record_sha256"] != _digest(text):
        raise ValueError("it was changed since it was written")
    if "sources" in record and "record_sha256" not in record:
        raise ValueError("it was changed since it was written: its digest is missing")
    if "curves_file" in record:
        record["metrics"] |= _curves(path, record)
    record["metrics"] = judged(record["metrics"], record.get("config", {}))
    return record


def judged(metrics: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with names that state which images they are of: `validation/` for `test/` where some were held out."""
    if config.get("data", {}).get("validation") is None:
        return metrics
    return {_held_out(name): value for name, value in metrics.items()}


def _held_out(name: str) -> str:
    return f"validation/{name.removeprefix('test/')}" if name.startswith("test/") else name


def _curves(path: Path, record: Record) -> dict[str, Metric]:
    """The curves of a record that are in a file beside it. Raises ValueError for the file of another record."""
    file = curves_path(path)
    if record["curves_file"] != file.name:
        raise ValueError(f"its curves_file is {record['curves_file']}, not {file.name}")
    content = file.read_bytes()
    if record.get("curves_sha256") not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{file.name} is not the file that was written with it")
    return json.loads(gzip.decompress(content))


def curves_path(path: Path) -> Path:
    """The file of long curves beside the record at `path`."""
    return path.with_name(f"{path.stem}.curves.json.gz")


def _digest(text: str) -> str:
    """SHA-256 of a record's text without its own digest."""
    before, seal, after = text.partition(SEAL)
    return hashlib.sha256((before + seal + after.partition('"')[2]).encode()).hexdigest()


def metric_of(record: Record, name: str) -> float | list[float | None]:
    """A recorded number or curve; NaN for a number that a diverged run lacks. Raises UserError for an unknown name.

    `test/...` means `validation/...` where the run held out images.
    """
    metrics = record["metrics"]
    name = _held_out(name) if _held_out(name) in metrics else name
    if name not in metrics and record["status"] != "diverged":
        raise UserError(f"record {record['id']} has no metric {name}{nearest(name, metrics)}")
    value: list[float | None] | float | None = metrics.get(name)
    return float("nan") if value is None else value


def value_of(record: Record, name: str) -> float:
    """A recorded number, as `metric_of`. Raises UserError for a curve."""
    value = metric_of(record, name)
    if isinstance(value, list):
        raise UserError(f"record {record['id']}: {name} is a curve, not a number")
    return float(value)


def write_record(path: Path, record: Record) -> None:
    """Writes a record: sorted keys, two-space indent, NaN as null, under 64 KiB, with the digest of its text."""
    kept = {key: value for key, value in record.items() if not key.startswith("curves_")} | {"record_sha256": ""}
    content = as_json(kept)
    if len(content) > RECORD_LIMIT:
        curves = {name: value for name, value in record["metrics"].items() if isinstance(value, list)}
        compressed = gzip.compress(as_json(curves), mtime=0)
        write_atomically(curves_path(path), compressed)
        numbers = {name: value for name, value in record["metrics"].items() if name not in curves}
        beside = {"curves_file": curves_path(path).name, "curves_sha256": hashlib.sha256(compressed).hexdigest()}
        content = as_json({**kept, "metrics": numbers, **beside})
    text = content.decode()
    write_atomically(path, text.replace(SEAL, SEAL + _digest(text), 1).encode())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the record at `path`. Raises UserError where they are missing or have another digest than in the record."""
    facts = read_record(path).get("arrays", {})
    file = path.with_suffix(".npz")
    if not file.exists() or sha256(file) != facts.get("sha256"):
        raise UserError(f"{file} is missing or is not what {path.name} describes; delete both and run again")
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())
    return {"sha256": sha256(path), "shapes": {name: list(array.shape) for name, array in arrays.items()}}


def as_json(value: Any) -> bytes:
    """Indented JSON with sorted keys, a list of numbers on one line."""
    text = json.dumps(finite(value), sort_keys=True, indent=2, allow_nan=False)
    lists = r"\[\n[^][{}]*\]"
    flat = re.sub(lists, lambda match: re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text)
    return (flat + "\n").encode()


def finite(value: Any) -> Any:
    """The value as JSON can express it: null for numbers that are not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def objective(record: Record, given: str | None, direction: str) -> float | None:
    """The metric `given`, a run's `objective`; for a sweeper, the worst value where the training diverged.

    given: of the run and not of the record, which may answer a run with another objective, as it is not part of an id.
    direction: `maximize` or `minimize`, the sweeper's; anything else without a sweeper, where a missing metric is None.
    Raises UserError for a metric that a sweeper needs and the run lacks.
    """
    numbers = numbers_of(record)
    name = given if given is None or given in numbers else _held_out(given)
    value = None if name is None else numbers.get(name)
    if direction not in ("maximize", "minimize"):
        return value
    if name not in numbers:
        raise UserError(f"objective={given}: this run measures {', '.join(sorted(numbers))}; set objective to one of them")
    worst = -math.inf if direction == "maximize" else math.inf
    return worst if value is None else value


def print_summary(record: Record, first: str | None = None) -> None:
    """Prints the last line of a run. first: the metric that is printed first."""
    numbers = numbers_of(record)
    numbers = {name: value for name, value in numbers.items() if name.startswith(("test/", "validation/"))} or numbers
    words = []
    for name, value in sorted(numbers.items(), key=lambda entry: (entry[0] != first, entry[0].endswith("/std"), entry[0])):
        shown = "nan" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
        words.append(f"{name}={shown}")
    shown = " ".join(words[:8] + (["..."] if len(words) > 8 else []))
    precision = record.get("precision", "unknown")  # a record may answer for a run in another one
    print(f"run {record['id']} {record['status']}: {shown} (precision {precision}, {record['ended'][:10]})", flush=True)


def numbers_of(record: Record) -> dict[str, float | None]:
    """The metrics without the curves."""
    return {name: value for name, value in record["metrics"].items() if not isinstance(value, list)}
