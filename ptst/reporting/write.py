"""A report from its settings to its files: the page, and beside it every figure and every table."""

from dataclasses import dataclass
from pathlib import Path

from ptst.errors import UserError
from ptst.progress import say
from ptst.reporting import plot
from ptst.reporting.config import ReportConfig
from ptst.reporting.content import make_content, read_material
from ptst.reporting.page import page
from ptst.runs import check_writable
from ptst.storage import refuse_link, write_atomically


@dataclass(frozen=True)
class Written:
    """The page, the files of figures (none without matplotlib) and of tables; `notes`: how many the page has."""

    page: Path
    figures: list[Path]
    tables: list[Path]
    notes: int


def write_report(config: ReportConfig) -> Written:
    """Write the page and its files. Raises UserError for a user's mistakes, and for a folder without results."""
    config.check()
    assert config.folder is not None, "check() wants one"
    path, files = config.page, config.page.with_suffix("")
    check_writable(path.parent)
    refuse_link(files)
    content = make_content(read_material(config.folder), config.show_answers)
    files.mkdir(parents=True, exist_ok=True)
    tables = list[Path]()
    for table in content.tables:
        for ending, text in (("tex", table.to_latex()), ("csv", table.to_csv())):
            tables.append(files / f"{table.name}.{ending}")
            write_atomically(tables[-1], text.encode(errors="backslashreplace"))
    figures = list[Path]()
    if config.figures:
        try:
            plot.check_matplotlib()
        except UserError as error:
            say(f"note: {error}; the page has all figures")
        else:
            for heat in content.heats:
                figures += plot.write_heat(heat, files)
            for chart in content.charts:
                figures += plot.write_chart(chart, files)
    write_atomically(path, page(content, files.name, bool(figures)).encode(errors="backslashreplace"))
    return Written(path, figures, tables, len(content.notes))
