"""make figure-3.2a SCALE=cpu: runs what is missing, draws.   --render-only trains nothing."""

from typing import Any

from common import Job, make_all, report

from gradexp.engine.registry import locate
from gradexp.report import figures, specs


def make(spec: dict[str, Any], job: Job) -> None:
    """Runs what is missing, then draws and writes the figure."""
    wanted = [words for cell in specs.cells(spec, job.scale) for words in cell.commands.values()]
    failures = job.fill(f"figure {spec['number']}", wanted)
    series = figures.gather(spec, job.scale, job.plan)
    sentences = figures.caption(spec, job.scale, series, job.plan)
    drawn = (spec, job.scale, series, locate(spec["draw"], "draw"), job.paths.results, sentences)
    report([] if failures else figures.make(*drawn), failures)


if __name__ == "__main__":
    make_all("figure", make, __doc__)
