"""make plan SCALE=cpu: which runs are missing and what they cost."""

import itertools
import math
import shutil
import statistics
from collections.abc import Iterable

import operations
import torch
from common import arguments, planner, shared
from joblib import cpu_count

from gradexp.engine.assemble import declare_hardware
from gradexp.engine.compose import compose_ahead
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.hardware import Hardware
from gradexp.engine.run import Config, Paths, Run, run_id
from gradexp.report import costs

CORE_FLOPS = 5e10  # a second of one core, where no record corrects it
GAUGES = 3  # kinds of trainings with records, by which computed times are corrected


def main() -> None:
    given = arguments(__doc__).parse_args()
    with exit_on_errors():
        config = shared(given.scale, given.set)
        paths, hardware = Paths.of(config), declare_hardware(config)
        history = known(paths, hardware)
        compose_ahead(itertools.chain(*costs.items(given.scale).values()), given.set)
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
    """Costs of runs on this machine, from records and operation counts. They improve as runs finish.

    config: with the hardware and paths of all runs. runs: those whose costs will be asked for.
    """

    def __init__(self, config: Config, runs: Iterable[Run]) -> None:
        self.paths, self.hardware = Paths.of(config), declare_hardware(config)
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
    counted = [name for name in gauge if computed[name]] if here or not is_gpu else []
    ratios = [history.samples[name][-1].rate / computed[name] for name in counted]
    factor = statistics.median(ratios) if ratios else 1.0
    for name in unknown:
        rate, unit = computed[name] * factor, units[name]
        history.counts[name] = costs.Sample(name, 1.0, operations.START + rate, rate, unit.memory_mib, unit.disk_mib, "")


def slots(hardware: Hardware) -> int:
    """How many runs are done at a time."""
    return torch.cuda.device_count() if hardware.kind == "gpu" else cpu_count()


if __name__ == "__main__":
    main()
