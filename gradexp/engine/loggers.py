"""Loggers of curves during a training. The failure of a logger never ends a run."""

from __future__ import annotations

import os
import time
from typing import Any

from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.engine.build import build
from gradexp.engine.run import Run

CONNECTING = 8.0  # seconds that W&B may take to answer; it would wait for 90
AGAIN = 900.0  # seconds after which a W&B that did not answer is tried again, by whichever run


def make_logger(run: Run) -> Any | None:
    """The Lightning logger that `logger` names; None if it is `none` or fails to start."""
    try:
        logger = build(run.config["logger"], where="logger", run=run)
        if logger is not None:
            logger.experiment  # noqa: B018 (starts it here, not in Lightning, where a failure ends the run)
        return logger
    except UserError:
        raise
    except Exception as error:
        print(f"{run.config['logger']['_target_']} is not available ({error}); going on without it", flush=True)
        return None


def none(*, run: Run, group: str) -> None:
    """No logger: curves are in the record anyway."""


def csv(*, run: Run, group: str) -> Any:
    """Curves, a line per pass, in csv/version_0/metrics.csv of the run's folder; in version_1 after a resume."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(run.folder, name="csv", flush_logs_every_n_steps=1)


def wandb(*, run: Run, group: str, project: str) -> Any | None:
    """Weights & Biases: offline where it has no key or can't be reached; None where WANDB_MODE is disabled."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb as library  # takes seconds

    mark = run.paths.cache / "wandb-out-of-reach"
    tried = mark.exists() and time.time() - mark.stat().st_mtime < AGAIN
    if mode == "online" and not tried and library.login(prompt=False, verify=False):
        logger = _wandb_logger(run, group, project, offline=False)
        try:
            logger.experiment  # noqa: B018 (connects)
            return logger
        except Exception as error:
            why = str(error).partition("\n")[0]
            print(f"W&B can't be reached ({why}); runs are logged offline for {AGAIN / 60:.0f} minutes", flush=True)
            write_atomically(mark, b"")
    return _wandb_logger(run, group, project, offline=True)


def _wandb_logger(run: Run, group: str, project: str, *, offline: bool) -> Any:
    from lightning.pytorch.loggers import WandbLogger
    from wandb import Settings

    # Without the command line, paths, the names of host and user, and the output.
    private = Settings(
        x_disable_meta=True,
        x_disable_machine_info=True,
        disable_git=True,
        save_code=False,
        console="off",
        program="run.py",
        host="",
        init_timeout=CONNECTING,
        mode="offline" if offline else "online",  # Lightning sets WANDB_MODE, which wandb has read already
    )
    config = {key: value for key, value in run.config.items() if key != "paths"}
    return WandbLogger(
        project=project,
        group=group,
        job_type=config["name"],
        tags=[config["scale"]["name"], config["data"]["name"], config["method"]["name"]],
        id=run.id,
        name=f"{config['name']}-{run.id}",
        offline=offline,
        save_dir=str(run.paths.outputs),
        config=config,
        resume="allow",
        settings=private,
    )


def close(logger: Any | None, metrics: dict[str, float], facts: dict[str, Any] | None = None) -> None:
    """Logs the final numbers and facts and closes the logger, so that the next run in this process gets a new one."""
    if logger is None:
        return
    try:
        logger.log_metrics(metrics)
        logger.log_hyperparams(facts or {})
        logger.finalize("success")
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
    except Exception as error:
        print(f"the logger failed at the end ({error}); the record has all numbers", flush=True)
