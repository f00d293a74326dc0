"""make claims SCALE=cpu: what the thesis says about its tables and figures, and whether our records say so too."""

import argparse

from common import shown

from gradexp.commands.compose import compose_run, plan
from gradexp.commands.exits import honest
from gradexp.report import claims
from gradexp.runs import ROOT, Paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of paths")
    given = parser.parse_args()
    file = ROOT / "conf" / "claims.yaml"
    with honest():
        paths = Paths.of(compose_run(["experiment=teacher", f"scale={given.scale}", *given.set]))
        judged = claims.read(file, given.scale, plan, paths)
        files = claims.write(judged, given.scale, claims.load(file)["confidence"], paths.results)
    for claim in judged:
        print(f"{claims.verdict(claim):<40} {claim.id:<20} {claim.says}")
    print(claims.tally(judged))
    print("written:", *(shown(path) for path in files))


if __name__ == "__main__":
    main()
