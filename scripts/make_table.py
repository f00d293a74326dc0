"""make table-2.1 SCALE=cpu: run what is missing, render and print.   --render-only: run nothing."""

from common import Job, make_all, report

from gradexp.report import specs, tables
from gradexp.report.specs import TableSpec


def make(spec: TableSpec, job: Job) -> None:
    """Run what is missing, then write and print the table."""
    failures = job.fill(f"table {spec['number']}", specs.commands(spec, job.scale))
    table = tables.build(spec, job.scale, job.plan)
    files = tables.write(table, specs.folder_of("table", spec["number"], job.paths.results))
    print(tables.to_text(table))
    report(files, failures)


if __name__ == "__main__":
    make_all("table", make, __doc__)
