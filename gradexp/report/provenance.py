"""What every table and figure says of itself: where its protocol departs from the thesis's, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradexp.engine.ensure import digests
from gradexp.engine.run import Config, Run, identity

DEPARTS = "Scale {} departs from scale=paper in:"
LISTED = 5  # runs whose ids a sentence names
UNINTERESTING = ("scale", "_target_", "version", "channels", "classes", "size")  # said by others, or no protocol


# --- the protocol -----------------------------------------------------------------------------------------


def departed(pairs: Iterable[tuple[Config, Config]]) -> dict[str, tuple[str, str]]:
    """Where the protocols of runs differ from those of the paper's scale: {key: (here, paper)}, in words.

    pairs: (config here, config at scale=paper) of each run. Where runs differ, each value is named once:
    `Adam(lr=0.003) or Adam(lr=0.003, weight_decay=0.001)`.
    """
    changes: dict[str, dict[tuple[str, str], None]] = {}
    for here, paper in pairs:
        for key, (ours, theirs) in departures(here, paper).items():
            changes.setdefault(key, {})[_word(ours), _word(theirs)] = None
    return {key: _alternatives(values) for key, values in changes.items()}


def departures(here: Config, paper: Config) -> dict[str, tuple[Any, Any]]:
    """Where a run's protocol differs from the paper scale's: {key: (here, paper)}."""
    ours, theirs = _flat(identity(here)), _flat(identity(paper))
    return {
        key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)
    }


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in config.items():
        if key in UNINTERESTING:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value.get("_partial_"):
            given = ", ".join(f"{k}={v}" for k, v in value.items() if not k.startswith("_"))
            items[name] = f"{value['_target_'].rpartition('.')[2]}({given})"
        elif isinstance(value, dict):
            items |= _flat(value, f"{name}.")
        else:
            items[name] = value
    return items


def _alternatives(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Where cells differ, each value once: `Adam(lr=0.003) or Adam(lr=0.003, weight_decay=0.001)`."""
    here, paper = (" or ".join(dict.fromkeys(values)) for values in zip(*pairs, strict=True))
    return here, paper


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def departure_sentence(scale: str, changes: dict[str, tuple[str, str]], told: tuple[str, ...] = ()) -> str:
    """One sentence on all of `changes`. told: starts of keys whose departures the spec's note describes."""
    if not changes:
        return f"Scale {scale}: the protocol of scale=paper."
    named = {key: values for key, values in changes.items() if not key.startswith(told)}
    listed = "; ".join(f"`{key}` {here} (paper: {paper})" for key, (here, paper) in named.items())
    places = [*(["what is said above"] if len(named) < len(changes) else []), *([listed] if listed else [])]
    return f"{DEPARTS.format(scale)} {'; '.join(places)}."


def enumerated(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


# --- the runs ---------------------------------------------------------------------------------------------


def read(runs: Iterable[Run]) -> tuple[list[Config], list[Config]]:
    """Records of the finished runs, and of the runs upstream of them, directly or not, as far as these are finished."""
    users = dict.fromkeys(run for run in runs if run.finished)
    below: dict[Run, None] = {}
    waiting = list(users)
    while waiting:
        upstream = [run for run in waiting.pop(0).upstream.values() if run.finished and run not in users and run not in below]
        below |= dict.fromkeys(upstream)
        waiting += upstream
    return [run.record() or {} for run in users], [run.record() or {} for run in below]


def origins(records: Sequence[Config], below: Sequence[Config] = ()) -> str:
    """One sentence on where numbers were computed: precision, device, commits. below: the records upstream of these."""
    if not records:
        return "No run has finished yet."
    work = [attempt for record in (*records, *below) for attempt in (record, *record.get("attempts", []))]
    devices = sorted({f"{one['precision']} on {one['device']}" for one in work if "precision" in one})
    commits = sorted({(one["git"]["commit"] or "none")[:8] + (" (dirty)" if one["git"]["dirty"] else "") for one in work})
    known = {record["id"]: record for record in (*records, *below) if "id" in record}
    seconds = sum(own_seconds(record, known, "wall") for record in (*records, *below))
    time = f"{seconds / 3600:.1f} h" if seconds >= 180 else f"{max(1, round(seconds / 60))} min"
    count = _runs(len(records)) + (f" and {len(below)} upstream" if below else "")
    where = f"{count}, {time}; precision {', '.join(devices)}; commit {', '.join(commits)}."
    return " ".join([where, *_remade(records, known)])


def own_seconds(record: Config, known: Mapping[str, Config], clock: str) -> float:
    """A run's seconds without those of its upstream runs; clock: `wall` or `cpu`; known: records by id.

    An older record counts them where they were done inside it, which is where they began after it.
    """
    seconds = record["seconds"]
    below = [] if "upstream" in seconds else [known.get(run.get("id")) for run in record.get("upstream", {}).values()]
    inside = [run for run in below if run and run["started"] >= record["started"]]
    return float(seconds[clock]) - sum(run["seconds"][clock] for run in inside)


def _remade(records: Sequence[Config], known: Mapping[str, Config]) -> Iterator[str]:
    """A sentence for each upstream run whose weights or maps were made again, and are not those of its record everywhere."""
    made: dict[tuple[str, str], dict[str, list[Config]]] = {}
    for record in records:
        upstream = record.get("upstream", {})
        for name, digest in digests(upstream).items():
            made.setdefault((name, upstream[name]["id"]), {}).setdefault(digest[:8], []).append(record)
    for (name, number), by_digest in made.items():
        left = known.get(number, {}).get("product", {}).get("sha256", "")
        noted = any("remade" in users[0]["upstream"][name] for users in by_digest.values())  # by records of an earlier version
        if len(by_digest) > 1 or noted or (left and left[:8] not in by_digest):
            times = f"{len(by_digest)} times" if len(by_digest) > 1 else "again after its record was written"
            listed = "; ".join(_making(digest, users) for digest, users in by_digest.items())
            yield f"Run {number} ({name}) was done {times}; its files: {listed}."


def _making(digest: str, users: Sequence[Config]) -> str:
    listed = f": {', '.join(user['id'] for user in users)}" if len(users) <= LISTED else ""
    return f"{digest} ({_runs(len(users))}{listed})"


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
