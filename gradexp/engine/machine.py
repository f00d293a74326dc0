"""python -m gradexp.engine.machine PART CONFIG DEVICES MACHINES HOST:PORT: one machine of several; srun starts it on each."""

import sys
from pkgutil import resolve_name

from gradexp.engine.processes import launch

if __name__ == "__main__":
    part, given, devices, machines, place = sys.argv[1:]
    sys.exit(0 if launch(resolve_name(part), given, int(devices), int(machines), place) is None else 1)
