"""make bench: what a training step costs, written to results/bench.md.   --quick: VGG-4 alone, printed, within a minute."""

import argparse

from gradexp.runs import ROOT
from gradexp.tasks import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    print(bench.run(ROOT / "results", quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()
