"""make report SCALE=cpu: one page of everything at a scale, from records alone; trains nothing."""

import json

from common import CLAIMS, arguments, planner, shared, shown
from joblib import cpu_count

from gradexp import __version__
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.origin import git_state
from gradexp.engine.run import Paths
from gradexp.report import claims, costs, figures, html, specs, tables
from gradexp.report.specs import Planner


def main() -> None:
    given = arguments(__doc__).parse_args()
    with exit_on_errors():
        paths = Paths.of(shared(given.scale, given.set))
        path = html.write(page(given.scale, paths, planner(given.set)), given.scale, paths.results)
    print(f"written: {shown(path)} ({path.stat().st_size / 1024:,.0f} KiB); open it in a browser")


def page(scale: str, paths: Paths, plan: Planner) -> str:
    commands: dict[str, str] = {}
    noting = html.remembering(plan, commands)
    said = html.settings()
    panels = html.Panels(paths, commands, said["curve_points"])
    made = [tables.build(spec, scale, noting) for spec in specs.at_scale("table", scale).values()]
    drawn = [(spec, figures.gather(spec, scale, noting)) for spec in specs.at_scale("figure", scale).values()]
    told = [figures.caption(spec, scale, series, noting) for spec, series in drawn]
    parts = html.chapters(
        [html.table_view(table, panels, said["close"]) for table in made],
        [html.figure_view(*one, scale, panels, sentences) for one, sentences in zip(drawn, told, strict=True)],
        html.claim_views(claims.read(CLAIMS, scale, noting), panels),
        said,
    )
    bench = paths.results / "bench.json"
    git = git_state()
    return html.render(
        scale,
        parts,
        panels,
        said,
        made_by=f"gradexp {__version__}, commit {(git['commit'] or 'none')[:8]}{' (dirty)' if git['dirty'] else ''}",
        explanation=claims.explanation(claims.load(CLAIMS)["confidence"]),
        bench=json.loads(bench.read_text()) if bench.exists() else None,
        costs=costs.to_table(costs.build(scale, plan, costs.History.of(paths)), cpu_count()),
    )


if __name__ == "__main__":
    main()
