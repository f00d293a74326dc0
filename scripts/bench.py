"""make bench: what a training step costs, written to results/bench.md.

--quick: VGG-4 alone, printed, within a minute.   --photographs: the images/s of JPEG files alone, printed.
"""

import argparse

from gradexp.bench import page, photographs
from gradexp.bench.steps import make_hardware
from gradexp.runs import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--photographs", action="store_true")
    given = parser.parse_args()
    if given.photographs:
        print(photographs.markdown(photographs.measure(make_hardware("32"), images=512, rounds=5)))
    else:
        print(page.run(ROOT / "results", quick=given.quick))


if __name__ == "__main__":
    main()
