"""Where curves are shown while a run trains; a logger never fails a run."""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlsplit

from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.run import Run


def make_logger(run: Run) -> Any | None:
    """The Lightning logger that `logger` names, or None where there is none or it can't start."""
    try:
        logger = build(run.config["logger"], where="logger", run=run)
        if logger is not None:
            logger.experiment  # noqa: B018 (Lightning would start it later, where a failure ends the run)
        return logger
    except UserError:
        raise
    except Exception as error:  # the run matters more than its curves
        print(f"{run.config['logger']['_target_']} is not available ({error}); going on without it", flush=True)
        return None


def none(*, run: Run, group: str) -> None:
    """No logger: curves are in the record anyway."""


def csv(*, run: Run, group: str) -> Any:
    """Curves, a line a pass, as csv/version_0/metrics.csv in the run's folder; a resumed run goes on in version_1."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(run.folder, name="csv", flush_logs_every_n_steps=1)


def wandb(*, run: Run, group: str, project: str) -> Any:
    """Weights & Biases: online when somebody is logged in, offline otherwise."""
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
    """Logs the final numbers and closes the logger, so that the next run of this process gets its own."""
    if logger is None:
        return
    try:
        logger.log_metrics(metrics)
        logger.finalize("success")
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
    except Exception as error:
        print(f"the logger failed at the end ({error}); the record has everything", flush=True)


def logged_in() -> bool:
    """Whether W&B has a key here; without one runs are logged offline."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False
