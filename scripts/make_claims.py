"""make claims SCALE=cpu: test the thesis's claims about its tables and figures on our records."""

from common import CLAIMS, arguments, planner, shared, shown

from gradexp.engine.exits import exit_on_errors
from gradexp.engine.plugins import own_conf_folders
from gradexp.engine.run import Paths
from gradexp.report import claims, unshown


def main() -> None:
    given = arguments(__doc__).parse_args()
    with exit_on_errors():
        paths = Paths.of(shared(given.scale, given.set))
        own = [file for folder in own_conf_folders() if (file := folder / "claims.yaml").exists()]
        plan = planner(given.set)
        idle = unshown.find(given.scale, plan, paths.results)
        for file, results, listed in [(CLAIMS, paths.results, idle), *((file, paths.results / "own", []) for file in own)]:
            judged = claims.read(file, given.scale, plan)
            files = claims.write(judged, given.scale, results, listed)
            for row in judged.claims.itertuples():
                print(f"{row.words:<40} {row.Index:<20} {row.claim}")
            other = judged.claims["chapter"] == claims.OTHER
            print(claims.tally(judged.claims.loc[~other, "verdict"]))
            print("written:", *(shown(path) for path in files))


if __name__ == "__main__":
    main()
