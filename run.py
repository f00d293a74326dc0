"""python run.py experiment=NAME [overrides]: one run.   python run.py -m ...: Hydra multirun."""

import os
import sys

import hydra
from omegaconf import DictConfig

from gradexp.errors import UserError
from gradexp.runs import Paths, Run, ensure, say
from gradexp.tasks.compose import check_overrides, compose_run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(_: DictConfig) -> float | None:
    """The run's test accuracy, where it has one: what a sweeper optimises."""
    from hydra.core.hydra_config import HydraConfig

    try:
        config = compose_run(HydraConfig.get().overrides.task)
        record = ensure(Run(config, Paths.of(config)))
    except UserError as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")
    say(record)
    accuracy: float | None = record["metrics"].get("test/accuracy")
    return accuracy


if __name__ == "__main__":
    try:
        check_overrides(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    main()
