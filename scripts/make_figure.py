"""make figure-3.2a SCALE=cpu: run what is missing, and draw.   --render-only: run nothing."""

from common import Job, make_all, report

from gradexp.engine.build import locate
from gradexp.report import figures, specs
from gradexp.report.specs import FigureSpec


def make(spec: FigureSpec, job: Job) -> None:
    """Run what is missing, then draw and write the figure."""
    failures = job.fill(f"figure {spec['number']}", specs.commands(spec, job.scale))
    series = figures.gather(spec, job.scale, job.plan)
    caption = figures.caption(spec, job.scale, series, job.plan)
    folder = specs.folder_of("figure", spec["number"], job.paths.results)
    drawn = (spec, job.scale, series, locate(spec["draw"], "draw"), folder, caption)
    report([] if failures else figures.make_once(*drawn, cache=job.paths.cache), failures)


if __name__ == "__main__":
    make_all("figure", make, __doc__)
