"""Records: what a finished run leaves in results/, checked when it is written and when it is read."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from datetime import datetime
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
    """Of the run alone; its upstream runs have their own."""

    wall: float
    cpu: float


@lenient
class Git(TypedDict):
    commit: str | None
    dirty: bool | None


@lenient
class Used(TypedDict):
    """An upstream run: which one, and (NAME_sha256) which file of it was used."""

    id: str
    experiment: NotRequired[str]


@lenient
class Product(TypedDict):
    """The file that a run left for others."""

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
    targets: NotRequired[
        str
    ]  # of a teacher: `stored` (once, in bfloat16 but for the logits) or `live` (computed for every batch)
    images: NotRequired[int]  # that a score is a mean over
    labels: NotRequired[list[int]]  # of a gallery's images
    layers: NotRequired[list[str]]
    sha256: NotRequired[dict[str, str]]  # of saliency maps
    product: NotRequired[Product]  # records before 2026-11-29 lack it
    weights_file: NotRequired[dict[str, str]]


def faults(record: Any, *, complete: bool) -> list[str]:
    """What is wrong with a record, nothing where it is right. complete: every required field must be there."""
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        return ["it has no metrics"]
    found = typed.faults(Record, record, missing=complete)
    if complete and not re.fullmatch("[0-9a-f]{12}", str(record.get("id"))):
        found.append(f"id={record.get('id')!r} is not twelve hexadecimal digits")
    if not found and record.get("status") == "finished" and record.get("steps", 0) < record.get("planned_steps", 0):
        found.append(f"its training ended after {record['steps']} of {record['planned_steps']} steps")
    return found


# --- reading ----------------------------------------------------------------------------------------------


def read_record(path: Path) -> Config:
    """A record, its curves included even where they were moved to the compressed file beside it."""
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
    """The arrays of the record at `path`. Raises UserError where they are missing or are not the record's."""
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
    text = json.dumps(finite(value), sort_keys=True, indent=2, allow_nan=False)
    flat = re.sub(
        r"\[\n[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
    return (flat + "\n").encode()  # a list of numbers stays on one line


def finite(value: Any) -> Any:
    """JSON knows no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
