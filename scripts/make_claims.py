"""make claims SCALE=cpu: what the thesis says about its tables and figures, and whether our records say so too."""

from common import CLAIMS, arguments, planner, shared, shown

from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import Paths
from gradexp.report import claims


def main() -> None:
    given = arguments(__doc__).parse_args()
    with exit_on_errors():
        paths = Paths.of(shared(given.scale, given.set))
        judged = claims.read(CLAIMS, given.scale, planner(given.set))
        files = claims.write(judged, given.scale, paths.results, confidence=claims.load(CLAIMS)["confidence"])
    for claim in judged:
        print(f"{claims.verdict(claim):<40} {claim.id:<20} {claim.says}")
    print(claims.tally(judged))
    print("written:", *(shown(path) for path in files))


if __name__ == "__main__":
    main()
