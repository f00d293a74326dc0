"""A W&B logger that a run survives."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import WandbLogger


class ForgivingWandb(WandbLogger):
    """Says once that W&B failed, then stays silent: the run matters more than its curves."""

    _broken = False

    def log_metrics(self, *args: Any, **options: Any) -> None:
        if self._broken:
            return
        try:
            super().log_metrics(*args, **options)
        except Exception as error:
            self._broken = True
            print(f"wandb failed ({error}); going on without it", flush=True)
