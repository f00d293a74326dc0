"""python -m gradexp.tasks.machine CONFIG DEVICES MACHINES HOST:PORT: one machine of several; srun starts it on each."""

import sys

from gradexp.engine.processes import launch
from gradexp.tasks.train import work

if __name__ == "__main__":
    given, devices, machines, place = sys.argv[1:]
    sys.exit(0 if launch(work, given, int(devices), int(machines), place) is None else 1)
