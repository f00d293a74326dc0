"""make bench: what a training step costs, written to results/bench.

--quick: VGG-4 alone, printed, within a minute.   --part maps: one part of this machine's page again, the others as they are.
"""

import argparse

from bench import page

from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true")
    how.add_argument("--part", choices=page.ROWS, action="append")
    given = parser.parse_args()
    with exit_on_errors():
        print(page.run(ROOT / "results", quick=given.quick, parts=given.part or page.ROWS))


if __name__ == "__main__":
    main()
