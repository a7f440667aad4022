"""`python -m ptst.report`: one page from the folder of a grid, a study or an evaluation."""

from typing import Any

from ptst import cli
from ptst.progress import printable, say
from ptst.reporting.config import ReportConfig


def run_command(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns what `--json` prints. Raises UserError for a user's mistakes."""
    config.check()
    say(f"ptst.report: reading {config.folder}")  # imports take seconds

    from ptst.reporting.write import write_report

    written = write_report(config)
    counts = {"figures": len(written.figures), "tables": len(written.tables), "notes": written.notes}
    if not config.json:
        print(printable(str(written.page)))
        beside = f"{counts['tables']} tables" + f" and {counts['figures']} figures" * bool(counts["figures"])
        say(f"{beside} in {written.page.with_suffix('')}")
    return {"page": str(written.page), **counts}


def main() -> None:
    cli.run(run_command, ReportConfig, "report")


if __name__ == "__main__":
    main()
