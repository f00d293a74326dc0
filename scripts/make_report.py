"""make report SCALE=cpu: render one page of everything at a scale from records; runs nothing."""

from pathlib import Path
from typing import Any

from common import CLAIMS, arguments, planner, shared, shown
from joblib import cpu_count

from gradexp import __version__
from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.base.texts import read_json
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.origin import git_state
from gradexp.engine.run import Paths
from gradexp.report import claims, costs, figures, html, specs, tables, unshown
from gradexp.report.specs import Planner


def main() -> None:
    given = arguments(__doc__).parse_args()
    with exit_on_errors():
        paths = Paths.of(shared(given.scale, given.set))
        path = paths.results / "report" / f"{given.scale}.html"
        write_atomically(path, page(given.scale, paths, planner(given.set)).encode())
        print(f"written: {shown(path)} ({path.stat().st_size / 1024:,.0f} KiB); open it in a browser")


def page(scale: str, paths: Paths, plan: Planner) -> str:
    settings = specs.settings()
    panels = html.Panels(settings["curve_points"])
    table_views = [
        html.table_view(tables.build(spec, scale, plan), panels, settings["close"])
        for spec in specs.at_scale("table", scale).values()
    ]
    figure_views = []
    for spec in specs.at_scale("figure", scale).values():
        series = figures.gather(spec, scale, plan)
        caption = figures.caption(spec, scale, series, plan)
        figure_views.append(html.figure_view(spec, series, scale, paths.results, panels, caption))
    judged = claims.read(CLAIMS, scale, plan)
    plan_rows: Any = costs.to_frame(costs.build(scale, plan, costs.History.of(paths)), cpu_count()).to_dict("records")
    git = git_state()
    return html.render(
        scale,
        {"tables": table_views, "figures": figure_views, "claims": html.claim_views(judged, panels)},
        panels,
        settings,
        made_by=f"gradexp {__version__}, commit {(git['commit'] or 'none')[:8]}{' (dirty)' if git['dirty'] else ''}",
        explanation=claims.explanation(judged),
        findings=judged.findings,
        unshown=unshown.find(scale, plan, paths.results),
        bench=[measured(file) for file in sorted((paths.results / "bench").glob("*.json"))],
        costs=plan_rows,
    )


def measured(file: Path) -> dict[str, Any]:
    """A file of results/bench. Raises UserError where it is damaged."""
    advice = "delete it, or measure again: make bench"
    bench = read_json(file, advice)
    if not all(isinstance(part, dict) and (name == "machine" or "rows" in part) for name, part in bench.items()):
        raise UserError(f"{file} is not a benchmark; {advice}")
    return {"machine": {}, **bench}


if __name__ == "__main__":
    main()
