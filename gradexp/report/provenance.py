"""Captions: how a table's or figure's protocol departs from the thesis's, and which runs its numbers come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradexp.engine.record import Clock, Record, used_digests, value_of
from gradexp.engine.run import Config, Run, identity
from gradexp.report import specs
from gradexp.report.specs import Planner, Spec, UpstreamSpec, item_of, read_thesis
from gradexp.report.writing import one_line, rendered

# Keys that are not compared: they are no part of the protocol (the scale's name, versions), or follow from the data set.
IGNORED = ("scale", "_target_", "version", "channels", "classes", "size")
LISTED = 8  # departures that a caption lists; more are among its details


class Caption(NamedTuple):
    """Sentences, and the lists behind them for the part of a page that opens on demand.

    departures: see `departed`. origin: those of the sentences that say where the numbers come from.
    """

    sentences: list[str]
    details: list[str]
    departures: Mapping[str, tuple[str, str]] = {}
    origin: Sequence[str] = ()


def caption(spec: Spec, scale: str, runs: Sequence[Run], plan: Planner, *, printed: bool = False) -> Caption:
    """The caption of a table or figure: notes, departures from the paper's protocol, seeds, and the origin of its runs.

    printed: whether it shows numbers of the thesis.
    """
    pairs = list(counterparts(spec, scale, plan))
    departures, described = departed(pairs), () if "series" in spec else tuple(spec.get("described", ()))
    listed = [f"`{key}` {a} (paper: {b})" for key, (a, b) in departures.items() if not key.startswith(described)]
    folded = [f"Departures from scale=paper: {'; '.join(listed)}."] if len(listed) > LISTED else []
    origin = origin_of(*records_of(runs))
    text = rendered(
        "caption.txt",
        spec=spec,
        scale=scale,
        notes=specs.notes(spec, scale),
        seeds=specs.seeds_of(spec, scale),
        begun=any(run.finished for run in runs),
        departures=departures,
        listed=listed,
        folded=folded,
        upstream=list(_upstream(spec, scale, plan)),
        printed=printed,
        held_out=any(config.get("data", {}).get("validation") for config, _ in pairs),
    )
    details = [*map(one_line, folded), *origin.details]
    return Caption([*text.splitlines(), *origin.sentences], details, departures, origin.sentences)


def counterparts(spec: Spec, scale: str, plan: Planner) -> Iterator[tuple[Config, Config]]:
    """The config of each cell's first run, and of the same cell at scale=paper.

    A table's column that scale=paper does not have is compared with the first one that it has.
    """
    for row, column, commands in specs.cells(spec, scale):
        if commands:
            seed, words = next(iter(commands.items()))
            known = [column] if "series" in spec else [column, *spec["columns"]]
            there = next((entry for entry in known if "paper" in entry.get("scales", ["paper"])), column)
            protocol: Any = {**spec, "overrides": []}  # without what a table sets for all of its cells
            yield plan(words).config, plan(specs.command(protocol, row, there, "paper", seed)).config


def _upstream(spec: Spec, scale: str, plan: Planner) -> Iterator[tuple[UpstreamSpec, Run, float | None, specs.Thesis | None]]:
    """The entries of `upstream`, each with its run, our number and the thesis's; None for a number that there is not."""
    for line in [] if "series" in spec else spec.get("upstream", []):
        if scale in line.get("scales", spec["seeds"]):
            run = plan([*line["overrides"], f"scale={scale}"])
            record = run.record()
            ours = value_of(record, line.get("metric", "test/accuracy")) if record else None
            printed = read_thesis().get((item_of(spec), *line["thesis"])) if scale in spec["comparable"] else None
            yield line, run, ours, printed


def departed(pairs: Iterable[tuple[Config, Config]], ignored: Collection[str] = IGNORED) -> dict[str, tuple[str, str]]:
    """The settings in which runs differ from their counterparts at scale=paper: {key: (here, paper)}, as text.

    pairs: (config here, config at scale=paper) of each run. If values differ between runs, each is named once:
    `Adam(lr=0.003) or Adam(lr=0.003, weight_decay=0.001)`. ignored: keys that are not compared.
    """
    changes: dict[str, list[tuple[Any, Any]]] = {}
    for here, paper in pairs:
        ours, theirs = (dict(_flat(identity(config), ignored)) for config in (here, paper))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                changes.setdefault(key, []).append((ours.get(key), theirs.get(key)))
    texts = {key: [_alternatives(key, values) for values in zip(*found, strict=True)] for key, found in changes.items()}
    return {key: (here, paper) for key, (here, paper) in texts.items()}


def _flat(config: Config, ignored: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"optim": {"passes": 3}} -> ("optim.passes", 3); a partial such as an optimizer is one value: `Adam(lr=0.003)`."""
    for key, value in config.items():
        if key in ignored:
            continue
        if isinstance(value, dict) and not value.get("_partial_"):
            yield from _flat(value, ignored, f"{prefix}{key}.")
        elif isinstance(value, dict):
            given = ", ".join(f"{k}={v}" for k, v in value.items() if not k.startswith("_"))
            yield f"{prefix}{key}", f"{value['_target_'].rpartition('.')[2]}({given})"
        else:
            yield f"{prefix}{key}", value


def _alternatives(key: str, values: Iterable[Any]) -> str:
    unset = "all" if key.rpartition(".")[2] in ("images", "per_class", "only_classes") else "not set"
    return " or ".join(dict.fromkeys(unset if value is None else str(value) for value in values))


def records_of(runs: Iterable[Run]) -> tuple[list[Record], list[Record]]:
    """The records of the finished runs, and of the finished runs upstream of them."""
    users = [run for run in dict.fromkeys(runs) if run.finished]
    below = [run for run in with_upstream(users) if run not in users]
    return [record for run in users if (record := run.record())], [record for run in below if (record := run.record())]


def with_upstream(runs: Iterable[Run]) -> dict[Run, None]:
    """The finished ones among these runs, each followed by the finished runs upstream of it; each run once."""
    found: dict[Run, None] = {}
    waiting = list(runs)
    while waiting:
        run = waiting.pop(0)
        if run.finished and run not in found:
            found[run] = None
            waiting = [*run.upstream.values(), *waiting]
    return found


def origin_of(records: Sequence[Record], below: Sequence[Record] = ()) -> Caption:
    """Where the numbers of these records come from; below: the records upstream of them."""
    every = [*records, *below]
    attempts = [attempt for record in every for attempt in (record, *record.get("attempts", []))]
    commits = sorted({(one["git"]["commit"] or "none")[:8] + (" (dirty)" if one["git"]["dirty"] else "") for one in attempts})
    known = {record["id"]: record for record in every if "id" in record}
    facts = {
        "records": len(records),
        "below": len(below),
        "minutes": sum(own_seconds(record, known, "wall") for record in every) / 60,
        "machines": sorted({_machine(one) for one in attempts if "precision" in one}),
        "commits": commits,
        "dirty": sum(commit.endswith("(dirty)") for commit in commits),
        "repeated": list(_repeated(records, known)),
    }
    return Caption(rendered("origin.txt", **facts).splitlines(), rendered("details.txt", **facts).splitlines())


def _machine(one: Mapping[str, Any]) -> str:
    """Precision, device and threads of a record or an attempt: the order of sums, and so the rounding, depends on them."""
    threads = f", {one['threads']} thread{'s' * (one['threads'] > 1)}" if "threads" in one else ""
    return f"{one['precision']} on {one['device']}{threads}"


def own_seconds(record: Record, known: Mapping[str, Record], clock: Clock) -> float:
    """A run's seconds without those of its upstream runs; clock: `wall` or `cpu`; known: records by id.

    Today a run starts after its upstream runs. The seconds of the first records include upstream runs that started after them;
    later ones state `upstream` seconds, which are not in the others.
    """
    seconds = record["seconds"]
    below = [] if "upstream" in seconds else [known.get(run.get("id")) for run in record.get("upstream", {}).values()]
    inside = [run for run in below if run and run["started"] >= record["started"]]
    return float(seconds[clock]) - sum(run["seconds"][clock] for run in inside)


def _repeated(records: Sequence[Record], known: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """The upstream runs that ran more than once, or whose record describes another file.

    Each as name, id, files ({digest: users}), known (whether there is a record of it), recorded (the file that this describes,
    "" if it does not say) and remade ({digest: metrics} of later trainings, which older records note).
    """
    used: dict[tuple[str, str], dict[str, list[str]]] = {}
    remade: dict[str, dict[str, Any]] = {}  # by run
    for record in records:
        upstream = record.get("upstream", {})
        for name, digest in used_digests(upstream).items():
            used.setdefault((name, upstream[name]["id"]), {}).setdefault(digest[:8], []).append(record["id"])
            if "remade" in upstream[name]:
                remade.setdefault(upstream[name]["id"], {})[digest[:8]] = upstream[name]["remade"]
    for (name, number), files in used.items():
        recorded = known[number].get("product", {}).get("sha256", "")[:8] if number in known else ""
        if len(files) > 1 or number in remade or recorded not in ("", *files):
            facts = {"known": number in known, "recorded": recorded, "remade": remade.get(number, {})}
            yield {"name": name, "id": number, "files": files, **facts}
