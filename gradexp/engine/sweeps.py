"""What a multirun prints at its end, and writes into its folder: a table of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from gradexp.engine.record import judged

ROW = "row.json"  # in the folder of each job


class SweepTable(Callback):
    """Called by Hydra (conf/config.yaml): at the end of a job in that job's process, at the end of the multirun in its own."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        finished = job_return.status == JobStatus.COMPLETED
        result = job_return.return_value if finished else "failed"
        words = dict(word.split("=", 1) for word in job_return.overrides or [] if "=" in word)
        measured: Any = judged({config.objective or "objective": result}, config)
        (folder / ROW).write_text(json.dumps(words | measured))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        files = sorted(folder.glob(f"*/{ROW}"), key=lambda file: (len(file.parent.name), file.parent.name))
        if len(files) < 2:
            return
        import pandas as pd

        frame = pd.DataFrame([json.loads(file.read_text()) for file in files])
        varied = [name for name in frame if name == frame.columns[-1] or frame[name].nunique(dropna=False) > 1]
        table = folder / "table.csv"
        frame.to_csv(table, index=False)
        print(f"{frame[varied].to_string(index=False)}\nwritten to {table}", flush=True)
