"""make plan SCALE=cpu: which runs are missing and what they cost.   --probe measures the cost of kinds without a record."""

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import operations
import torch
from common import arguments, planner, shared
from joblib import cpu_count

from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.engine.build import build
from gradexp.engine.compose import compose_ahead
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.hardware import Hardware
from gradexp.engine.record import Record
from gradexp.engine.run import Config, Paths, Run, run_id
from gradexp.engine.task import task_of
from gradexp.report import costs

CORE_FLOPS = 5e10  # a second of one core, where no record corrects it
START = 20.0  # seconds that any run takes
LADDER = (1, 4, 16)  # the sizes to which runs that train nothing are cut for a probe
GAUGES = 3  # kinds of trainings with records, by which computed times are corrected


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--probe", action="store_true", help="measure kinds of runs of unknown cost, which takes minutes each")
    given = parser.parse_args()
    with exit_on_errors():
        config = shared(given.scale, given.set)
        paths, hardware = Paths.of(config), build(config["trainer"], where="trainer")
        history = known(paths, hardware)
        compose_ahead(itertools.chain(*costs.items(given.scale).values()), given.set)
        rows = costs.build(given.scale, planner(given.set), history)
        if given.probe:
            measure([run.config | {"trainer": config["trainer"]} for run in rows.iloc[-1]["unknown"]], paths, history)
            history = known(paths, hardware)
            rows = costs.build(given.scale, planner(given.set), history)
        if rows.iloc[-1]["unknown"]:
            count([run.config for run in rows.iloc[-1]["unknown"]], history, hardware)
            rows = costs.build(given.scale, planner(given.set), history)
        free = shutil.disk_usage(next(folder for folder in (paths.outputs, *paths.outputs.parents) if folder.exists())).free
        print(costs.to_text(rows, given.scale, slots(hardware), hardware.facts()["device"], free / 2**30))


def known(paths: Paths, hardware: Hardware) -> costs.History:
    history = costs.History.of(paths, hardware.facts()["device"], "wall" if hardware.kind == "gpu" else "cpu")
    history.sizes = operations.SIZES | history.sizes
    return history


class Estimates:
    """Costs of runs on this machine, from records, probes and operation counts. They improve as runs finish.

    config: with the hardware and paths of all runs. runs: those whose costs will be asked for.
    """

    def __init__(self, config: Config, runs: Iterable[Run]) -> None:
        self.paths, self.hardware = Paths.of(config), build(config["trainer"], where="trainer")
        self.history = known(self.paths, self.hardware)
        needed = [run.config for run, to_do in costs.needed(runs).items() if to_do]
        count(needed, self.history, self.hardware)
        self._seconds: dict[str, float] = {}

    def seconds(self, config: Config, slots: int) -> float:
        """Seconds of the wall clock that a run takes beside `slots` - 1 others; infinite if the cost is unknown."""
        name = run_id(config)
        if name not in self._seconds:
            cost = self.history.cost(config)
            threads = 1 if self.hardware.kind == "gpu" else max(1, cpu_count() // slots)
            self._seconds[name] = cost.seconds / threads if cost else math.inf
        return self._seconds[name]

    def learn(self, run: Run) -> None:
        """Note what a finished run cost."""
        if record := run.record():
            self.history.learn(record["config"], record.get("data", {}))
            if learned := costs.sample(record, self.history.sizes, {}, run.folder, self.history.clock):
                self.history.add(learned)
            self._seconds.clear()


# --- operation counts -------------------------------------------------------------------------------------


def count(configs: Iterable[Config], history: costs.History, hardware: Hardware) -> None:
    """Adds what operation counts give for the runs whose cost is otherwise unknown."""
    kinds = {costs.signature(config): config for config in configs}
    unknown = {name: config for name, config in kinds.items() if name not in history.samples}
    here = [name for name, samples in history.samples.items() if any(sample.device == history.device for sample in samples)]
    known = {name: history.configs[name] for name in (here or history.samples) if "optim" in history.configs.get(name, {})}
    gauge = dict(list(known.items())[:GAUGES])
    units = operations.counts(unknown | gauge)
    is_gpu = hardware.kind == "gpu"
    computed = {name: unit.gpu_seconds if is_gpu else unit.flops / CORE_FLOPS for name, unit in units.items()}
    ratios = [history.samples[name][-1].rate / computed[name] for name in gauge] if here or not is_gpu else []
    factor = statistics.median(ratios) if ratios else 1.0
    for name in unknown:
        rate, unit = computed[name] * factor, units[name]
        history.counts[name] = costs.Sample(name, 1.0, START + rate, rate, unit.memory_mib, unit.disk_mib, "")


def slots(hardware: Hardware) -> int:
    """How many runs are done at a time."""
    return torch.cuda.device_count() if hardware.kind == "gpu" else cpu_count()


def measure(configs: Sequence[Config], paths: Paths, history: costs.History) -> None:
    """Probes the shortest run of each kind, and stores the samples in outputs/probes/."""
    short = sorted(configs, key=lambda config: task_of(config).work(config, history.sizes) or 0, reverse=True)
    kinds = {costs.signature(config): config for config in short}
    for number, (name, config) in enumerate(kinds.items(), 1):
        print(f"[{number}/{len(kinds)}] probing {config['name']} {config.get('method', {}).get('name', '')}", flush=True)
        try:
            sample = probed(config, paths, history)
        except UserError as error:
            print(f"    {error}", flush=True)
            continue
        content = json.dumps({"sample": asdict(sample), "sizes": history.sizes}, indent=2).encode()
        write_atomically(paths.outputs / "probes" / f"{sha256(name.encode()).hexdigest()[:12]}.json", content)


def probed(config: Config, paths: Paths, history: costs.History) -> costs.Sample:
    import probe  # imports Lightning, which takes seconds

    if "optim" in config:
        return probed_training(config, probe.in_its_own_process(probe.training, config, paths, threads=1), history)
    cut = [short for n in LADDER if (short := task_of(config).shortened(config, n))]
    if not cut:
        raise UserError("it cannot be shortened; it takes seconds to minutes")
    return probed_looking(config, probe.in_its_own_process(probe.looking, cut, paths, threads=1), history)


def probed_training(config: Config, probe: dict[str, Any], history: costs.History) -> costs.Sample:
    """The sample of a training whose first steps were probed (scripts/probe.py).

    A teacher's targets count as a cost of each image: the more images a run shows, the more targets it needs.
    """
    history.learn(config, probe["data"])
    size = task_of(config).work(config, history.sizes) or 1.0
    ready, image, judged = (probe["seconds"][name][history.clock] for name in ("ready", "image", "judge"))
    rate = image + (ready / size if "teacher" in config["upstream"] else 0.0)
    facts = float(probe["peak_memory_mib"]), 4 * probe["parameters"] / 2**20, probe["device"]
    return costs.Sample(costs.signature(config), size, ready + image * size + judged, rate, *facts, probe=True)


def probed_looking(config: Config, records: Sequence[Record], history: costs.History) -> costs.Sample:
    """The sample of a run that was cut to the LADDER: total from the first, rate from the third minus the second."""
    history.learn(config, records[0]["data"])
    sizes = [task_of(record["config"]).work(record["config"], history.sizes) or 1.0 for record in records]
    seconds = [record["seconds"][history.clock] for record in records]
    rate = max(0.0, (seconds[2] - seconds[1]) / (sizes[2] - sizes[1]))
    facts = float(records[-1]["peak_memory_mib"]), 0.0, records[0]["device"]
    return costs.Sample(costs.signature(config), sizes[0], seconds[0], rate, *facts, probe=True)


if __name__ == "__main__":
    main()
