"""make verify: checks every record and the files of its run on this disk, and that a sample of quick runs repeats."""

import argparse
import itertools
import sys

from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import Paths
from gradexp.engine.verify import Finding, repeat_own, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=3, help="how many quick records to repeat")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="of trainer or paths")
    given = parser.parse_args()
    if given.sample < 0:
        raise UserError(f"--sample {given.sample}: expected a number of records, 0 or more")
    config = compose_run(["experiment=teacher", "logger=none", *given.set])
    extra = {name: config[name] for name in ("trainer", "logger", "gradients")}
    paths, wrong = Paths.of(config), 0
    lines = verify(paths, sample=given.sample, seed=given.seed, extra=extra)
    for line in itertools.chain(lines, repeat_own(paths, extra) if given.sample else ["nothing was repeated (--sample 0)"]):
        wrong += isinstance(line, Finding)
        print(f"{line.record.parent.name}/{line.record.name}: {line.what}" if isinstance(line, Finding) else line, flush=True)
    if wrong:
        sys.exit(f"error: {wrong} findings")


if __name__ == "__main__":
    with exit_on_errors():
        main()
