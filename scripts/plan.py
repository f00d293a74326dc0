"""make plan SCALE=cpu: which runs are missing and what they cost.   --probe measures the cost of kinds without a record."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256

import probe
import torch
from common import arguments, planner, shared
from joblib import cpu_count

from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.engine.build import build
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.hardware import Hardware
from gradexp.engine.run import Config, Paths
from gradexp.engine.task import task_of
from gradexp.report import costs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--probe", action="store_true", help="measure kinds of runs of unknown cost, which takes minutes each")
    given = parser.parse_args()
    with exit_on_errors():
        config = shared(given.scale, given.set)
        paths, hardware = Paths.of(config), build(config["trainer"], where="trainer")
        history = known(paths, hardware)
        rows = costs.build(given.scale, planner(given.set), history)
        if given.probe:
            measure([run.config | {"trainer": config["trainer"]} for run in rows[-1].unknown], paths, history)
            history = known(paths, hardware)
            rows = costs.build(given.scale, planner(given.set), history)
    free = shutil.disk_usage(next(folder for folder in (paths.outputs, *paths.outputs.parents) if folder.exists())).free
    print(costs.to_text(rows, given.scale, slots(hardware), hardware.facts()["device"], free / 2**30))


def known(paths: Paths, hardware: Hardware) -> costs.History:
    return costs.History.of(paths, hardware.facts()["device"], "wall" if hardware.kind == "gpu" else "cpu")


def slots(hardware: Hardware) -> int:
    """How many runs are done at a time."""
    return torch.cuda.device_count() if hardware.kind == "gpu" else cpu_count()


def measure(configs: Sequence[Config], paths: Paths, history: costs.History) -> None:
    """Probes the shortest run of each kind, and stores the samples in outputs/probes/."""
    short = sorted(configs, key=lambda config: costs.amount(config, history.sizes) or 0, reverse=True)
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
    if "optim" in config:
        return costs.probed_training(config, probe.in_its_own_process(probe.training, config, paths, threads=1), history)
    cut = [short for n in costs.LADDER if (short := task_of(config).shortened(config, n))]
    if not cut:
        raise UserError("it cannot be shortened; it takes seconds to minutes")
    return costs.probed_looking(config, probe.in_its_own_process(probe.looking, cut, paths, threads=1), history)


if __name__ == "__main__":
    main()
