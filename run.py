"""python run.py experiment=NAME [overrides]: one run.   python run.py -m ...: Hydra multirun.

python run.py --help: the experiments and what else can be typed.
"""

import os
import sys
from contextlib import nullcontext

import hydra
from omegaconf import DictConfig

from gradexp import __version__
from gradexp.engine import help
from gradexp.engine.build import check_settings
from gradexp.engine.command_line import check_overrides, refuse_copies, refuse_many_devices
from gradexp.engine.compose import CONF, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.known import answer
from gradexp.engine.origin import git_state
from gradexp.engine.record import objective, print_summary
from gradexp.engine.run import Paths


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(_: DictConfig) -> float | None:
    """Does a run and returns its objective, which a sweeper optimises."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    # In processes of joblib and submitit errors are raised: a run that fails must not end the others.
    with nullcontext() if "Basic" not in hydra_config.launcher["_target_"] else exit_on_errors():
        run = plan(hydra_config.overrides.task)
        if hydra_config.mode == RunMode.MULTIRUN:
            refuse_many_devices(run.config)
        record = ensure(run)
        print_summary(record, run.config["objective"])
        direction = hydra_config.sweeper.get("direction")
        return objective(record, run.config["objective"], str(getattr(direction, "name", direction)))


if __name__ == "__main__":
    with exit_on_errors():
        words = sys.argv[1:]
        if {"-h", "--help"} & set(words):
            print(help.text(words))
        elif words == ["--version"]:
            print(f"gradexp {__version__}, commit {git_state()['commit'] or 'unknown'}")
        elif words[:1] in (["--show"], ["--id"]):
            if run := answer(words):
                print_summary(ensure(run))
        elif {"-sc", "--shell-completion", "--hydra-help"} & set(words):
            main()
        else:
            refuse_copies(words, os.environ)
            configs = check_overrides(words)
            for config in configs:
                if len(configs) > 1:  # a single run is checked when it begins
                    check_settings(config)
                (Paths.of(config).outputs / "hydra").mkdir(parents=True, exist_ok=True)  # else Hydra fails with a traceback
            main()
