"""Tables and figures as data: conf/table/*.yaml and conf/figure/*.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import yaml

from gradexp.base.errors import UserError, nearest
from gradexp.engine.run import ROOT, Config, Run

SHOWN = ("experiment", "metric", "spread", "thesis_metric")  # of a row, a column or the table
TABLE_KEYS = (
    *("thesis", "title", "where", "note", "notes", "told", "needs", "corner", "best", "best_per"),
    *("seeds", "comparable", "only", "rows", "columns", "upstream", *SHOWN),
)
FIGURE_KEYS = (
    *("thesis", "title", "note", "notes", "needs", "draw", "experiment", "seeds", "points", "overrides_at", "series", "also"),
    *(
        "x",
        "xlabel",
        "xscale",
        "ylabel",
        "lines",
        "metric",
        "metrics",
        "curves",
        "panels",
        "array",
        "above",
        "signed",
        "reading",
    ),
    *("columns", "rows", "first", "beside", "comparable"),
)
REQUIRED = {
    "table": ("title", "seeds", "comparable", "best", "corner", "rows", "columns"),
    "figure": ("title", "seeds", "draw", "series"),
}
PART_KEYS = {
    "rows": ("label", "thesis", "overrides", "apart", *SHOWN),
    "columns": ("label", "thesis", "overrides", "scales", "seeds", "best", *SHOWN),
    "upstream": ("label", "thesis", "overrides", "scales", "metric"),
}
SERIES_KEYS = ("label", "experiment", "overrides", "points", "panel", "overlay", "scales")
POINT_KEYS = ("x", "overrides", "scales")
CURVE_KEYS = ("metric", "ylabel", "yscale")
FIGURE_PART_KEYS = {"series": SERIES_KEYS, "points": POINT_KEYS, "curves": CURVE_KEYS, "lines": ("y", "label")}

Planner = Callable[[Sequence[str]], Run]


def numbers(kind: str) -> list[str]:
    """The tables or figures that there are; kind: `table` or `figure`."""
    return sorted(file.stem for file in (ROOT / "conf" / kind).glob("*.yaml"))


def parts(kind: str, number: str) -> list[str]:
    """`3.2` when there is one, otherwise its parts `3.2a`, `3.2b`; [number] where there is neither."""
    there = numbers(kind)
    return [number] if number in there else [name for name in there if name[:-1] == number] or [number]


def load(kind: str, number: str) -> Config:
    """The spec of a table or figure, with its `number`. Raises UserError when there is none, or it lacks something."""
    there = numbers(kind)
    if number not in there:
        raise UserError(f"no {kind} {number}{nearest(number, there)} conf/{kind}/ has {', '.join(there) or 'none'}")
    file = ROOT / "conf" / kind / f"{number}.yaml"
    try:
        spec: Config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"conf/{kind}/{number}.yaml is not YAML: {' '.join(str(error).split())}") from None
    check_keys(spec, TABLE_KEYS if kind == "table" else FIGURE_KEYS, f"{kind} {number}")
    for part, known in (PART_KEYS if kind == "table" else FIGURE_PART_KEYS).items():
        for node in spec.get(part, []):
            check_keys(node, known, f"{kind} {number}, {part}")
            for point in node.get("points", []):
                check_keys(point, POINT_KEYS, f"{kind} {number}, points of {node['label']}")
    if lacking := [key for key in REQUIRED[kind] if key not in spec]:
        raise UserError(f"{kind} {number}: conf/{kind}/{number}.yaml has no {', '.join(lacking)}")
    return {"number": number, **spec}


def at_scale(kind: str, scale: str) -> dict[str, Config]:
    """{number: spec} of the tables or figures that a scale has."""
    found = {number: load(kind, number) for number in numbers(kind)}
    return {number: spec for number, spec in found.items() if scale in spec["seeds"]}


def check_keys(node: Config, known: Sequence[str], where: str) -> None:
    """Raises UserError for a key that is not known."""
    for key in node:
        if key not in known:
            raise UserError(f"{where}: there is no key {key}{nearest(str(key), known)} It may have {', '.join(known)}")


def seeds_of(spec: Config, scale: str) -> list[int]:
    """The seeds at a scale. Raises UserError for a scale that the spec does not have."""
    if scale not in spec["seeds"]:
        raise UserError(f"scale={scale}: {spec['number']} has {', '.join(spec['seeds'])}")
    return list(spec["seeds"][scale])
