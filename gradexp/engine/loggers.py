"""Loggers of curves during a training. The failure of a logger never ends a run."""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlsplit

from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.run import Run


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
    """Curves, a line a pass, in csv/version_0/metrics.csv of the run's folder; in version_1 after a resume."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(run.folder, name="csv", flush_logs_every_n_steps=1)


def wandb(*, run: Run, group: str, project: str) -> Any:
    """Weights & Biases, offline if nobody is logged in."""
    from lightning.pytorch.loggers import WandbLogger  # importing wandb takes seconds

    os.environ.setdefault("WANDB_SILENT", "true")
    config = {key: value for key, value in run.config.items() if key != "paths"}
    return WandbLogger(
        project=project,
        group=group,
        job_type=config["name"],
        tags=[config["scale"]["name"], config["data"]["name"], config["method"]["name"]],
        id=run.id,
        name=f"{config['name']}-{run.id}",
        offline=not logged_in(),
        save_dir=str(run.paths.outputs),
        config=config,
        resume="allow",
    )


def close(logger: Any | None, metrics: dict[str, float]) -> None:
    """Logs the final numbers and closes the logger, so that the next run in this process gets a new one."""
    if logger is None:
        return
    try:
        logger.log_metrics(metrics)
        logger.finalize("success")
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
    except Exception as error:
        print(f"the logger failed at the end ({error}); the record has all numbers", flush=True)


def logged_in() -> bool:
    """Whether W&B is to be used online and has a key for its server."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False
