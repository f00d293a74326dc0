"""Records: what finished runs leave in results/, checked when they are written and when they are read."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import AfterValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from gradexp.base import typed
from gradexp.base.errors import UserError, nearest
from gradexp.base.files import sha256, write_atomically

RECORD_LIMIT = 64 * 1024  # bytes; longer curves go to a compressed file beside the record

Metric = float | None | list[float | None]  # null where a number is not finite
Moment = Annotated[str, AfterValidator(lambda text: datetime.fromisoformat(text) and text)]
Config = dict[str, Any]
lenient = with_config(ConfigDict(extra="allow", strict=True))  # tasks add facts of their own, and older records have others


@lenient
class Seconds(TypedDict):
    """Of the run without its upstream runs."""

    wall: float
    cpu: float


@lenient
class Git(TypedDict):
    commit: str | None
    dirty: bool | None


@lenient
class Used(TypedDict):
    """An upstream run: its id, and (NAME_sha256) the digest of its file that was used."""

    id: str
    experiment: NotRequired[str]


@lenient
class Product(TypedDict):
    """The file that a run left for other runs."""

    file: str
    sha256: str


@lenient
class Record(TypedDict):
    """What a finished run leaves in results/runs/."""

    id: str
    experiment: str
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
    command: NotRequired[str]  # hardware and folders aside; records before 2026-11-29 lack it
    data: NotRequired[dict[str, Any]]
    arrays: NotRequired[dict[str, Any]]
    attempts: NotRequired[list[dict[str, Any]]]  # origins of earlier attempts, on other machines or with other code
    curves_file: NotRequired[str]
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
    layers: NotRequired[list[str]]
    sha256: NotRequired[dict[str, str]]  # of saliency maps
    product: NotRequired[Product]  # records before 2026-11-29 lack it
    weights_file: NotRequired[dict[str, str]]


def faults(record: Any, *, complete: bool) -> list[str]:
    """What is wrong with a record, a line each; empty for a valid one. complete: every required field must exist."""
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        return ["it has no metrics"]
    wrong = typed.faults(Record, record, missing=complete)
    if complete and not re.fullmatch("[0-9a-f]{12}", str(record.get("id"))):
        wrong.append(f"id={record.get('id')!r} is not twelve hexadecimal digits")
    if not wrong and record.get("status") == "finished" and record.get("steps", 0) < record.get("planned_steps", 0):
        wrong.append(f"its training ended after {record['steps']} of {record['planned_steps']} steps")
    return wrong


# --- reading ----------------------------------------------------------------------------------------------


def read_record(path: Path) -> Config:
    """A record with its curves, which may be in a compressed file beside it. Do not modify it: it is kept for the next reader.

    Raises UserError where it cannot be read or is not valid.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(path, str(error)) from None
    return _parsed(path, state.st_ino, state.st_mtime_ns, state.st_size)


@cache
def _parsed(path: Path, *_state: int) -> Config:
    """A table, its caption and the page read the same records; each state of a file is parsed once in a process."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "curves_file" in record:
            curves = gzip.decompress((path.parent / record["curves_file"]).read_bytes())
            record["metrics"] |= json.loads(curves)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise _unreadable(path, str(error)) from None
    if wrong := faults(record, complete=False):
        raise _unreadable(path, wrong[0])
    return record


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"record {path} can't be read ({why}); delete it and run again, or restore it with git")


def metric_of(record: Config, name: str) -> float | list[float | None]:
    """A recorded number or curve; NaN for a number that a diverged run lacks. Raises UserError for an unknown name."""
    metrics = record["metrics"]
    if name not in metrics and record["status"] != "diverged":
        raise UserError(f"record {record['id']} has no metric {name}{nearest(name, metrics)}")
    value: list[float | None] | float | None = metrics.get(name)
    return float("nan") if value is None else value


def value_of(record: Config, name: str) -> float:
    """A recorded number, as `metric_of`. Raises UserError for a curve."""
    value = metric_of(record, name)
    if isinstance(value, list):
        raise UserError(f"record {record['id']}: {name} is a curve, not a number")
    return float(value)


# --- writing ----------------------------------------------------------------------------------------------


def write_record(path: Path, record: Config) -> None:
    """Writes a record: sorted keys, two-space indent, NaN as null, under 64 KiB."""
    content = as_json(record)
    if len(content) > RECORD_LIMIT:
        curves = {name: value for name, value in record["metrics"].items() if isinstance(value, list)}
        curves_file = path.with_name(f"{path.stem}.curves.json.gz")
        write_atomically(curves_file, gzip.compress(as_json(curves), mtime=0))
        numbers = {name: value for name, value in record["metrics"].items() if name not in curves}
        content = as_json({**record, "metrics": numbers, "curves_file": curves_file.name})
    write_atomically(path, content)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the record at `path`. Raises UserError where they are missing or have another digest than in the record."""
    facts = read_record(path).get("arrays", {})
    file = path.with_suffix(".npz")
    if not file.exists() or sha256(file) != facts.get("sha256"):
        raise UserError(f"{file} is missing or is not what {path.name} describes; delete both and run again")
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Config:
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
    """The value with null for numbers that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- at the end of a run ----------------------------------------------------------------------------------


def objective(record: Config, direction: str) -> float | None:
    """The metric that the config names `objective`; for a sweeper, the worst value where the training diverged.

    direction: `maximize` or `minimize`, the sweeper's; anything else without a sweeper, where a missing metric is None.
    Raises UserError for a metric that a sweeper needs and the run lacks.
    """
    name, metrics = record["config"].get("objective", "test/accuracy"), numbers_of(record)
    value: float | None = metrics.get(name)
    if direction not in ("maximize", "minimize"):
        return value
    if name not in metrics:
        raise UserError(f"objective={name}: this run measures {', '.join(sorted(metrics))}; set objective to one of them")
    worst = -math.inf if direction == "maximize" else math.inf
    return value if value is not None and math.isfinite(value) else worst


def print_summary(record: Config) -> None:
    """Prints the last line of a run."""
    numbers = numbers_of(record)
    numbers = {name: value for name, value in numbers.items() if name.startswith("test/")} or numbers
    words = [f"{name}={_short(value)}" for name, value in sorted(numbers.items())]
    shown = " ".join(words[:8] + (["..."] if len(words) > 8 else []))
    print(f"run {record['id']} {record['status']}: {shown}", flush=True)


def numbers_of(record: Config) -> dict[str, float | None]:
    """The metrics without the curves."""
    return {name: value for name, value in record["metrics"].items() if not isinstance(value, list)}


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
