"""What a record is, checked when one is written and when one is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

STATUS = ("finished", "diverged")

# Every record has these; tasks add facts of their own.
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "experiment": str,
    "scale": str,
    "seed": int,
    "status": str,
    "metrics": dict,
    "config": dict,
    "upstream": dict,
    "seconds": dict,
    "peak_memory_mib": int,
    "versions": dict,
    "git": dict,
    "started": str,
    "ended": str,
}
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "data": dict,
    "arrays": dict,
    "attempts": list,  # the origins of earlier attempts of a training that was resumed elsewhere, or with other code
    "curves_file": str,
    "device": str,
    "devices": int,
    "precision": str,
    "strict": bool,
    "threads": int,
    "parameters": int,
    "peak_gpu_memory_mib": int,
    "steps": int,
    "planned_steps": int,  # steps are fewer only where the training diverged; records before 2026-11-29 lack it
    "images_per_second": (int, float),
    "targets": str,  # of a teacher: `stored` once, in bfloat16 but for the logits, or `live`, computed for every batch
    "images": int,  # that a score is a mean over
    "labels": list,  # of a gallery's images
    "layers": list,
    "sha256": dict,  # of saliency maps
    "weights_file": dict,
}


def faults(record: Any, *, complete: bool) -> list[str]:
    """What is wrong with a record, nothing where it is right. complete: every required field must be there."""
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        return ["it has no metrics"]
    found = [f"it has no {name}" for name in REQUIRED if complete and name not in record]
    for name, kind in (REQUIRED | OPTIONAL).items():
        if name in record and (not isinstance(record[name], kind) or (isinstance(record[name], bool) and kind is not bool)):
            found.append(f"{name} is {type(record[name]).__name__}")
    if found:
        return found
    found += [f"metric {name} is no number" for name, value in record["metrics"].items() if not _numbers(value)]
    if record.get("status", STATUS[0]) not in STATUS:
        found.append(f"status is {record['status']}")
    if record.get("status") == "finished" and record.get("steps", 0) < record.get("planned_steps", 0):
        found.append(f"its training ended after {record['steps']} of {record['planned_steps']} steps")
    if complete:
        found += _details(record)
    return found


def _details(record: Mapping[str, Any]) -> list[str]:
    found = [] if re.fullmatch("[0-9a-f]{12}", record["id"]) else [f"id is {record['id']}"]
    found += [f"seconds has no {name}" for name in ("wall", "cpu") if not isinstance(record["seconds"].get(name), int | float)]
    found += [f"upstream {name} has no id" for name, run in record["upstream"].items() if "id" not in run]
    for name in ("started", "ended"):
        try:
            datetime.fromisoformat(record[name])
        except ValueError:
            found.append(f"{name} is no time")
    return found


def _numbers(value: Any) -> bool:
    return all(map(_number, value)) if isinstance(value, list) else _number(value)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
