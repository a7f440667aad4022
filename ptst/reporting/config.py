"""Settings of the report."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ptst.errors import Setting, UserError
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandSettings):
    """Write report.html, one page without a network, from the folder of a grid, a study or an evaluation."""

    folder: Positional[Path | None] = None
    """Folder of a ptst.grid, of a study (ptst.grid --recipe ladder) or of a ptst.eval, finished or not."""
    out: Path | None = None
    """The page to write. Figures and tables go to the folder of its name beside it: report/ for report.html. Default:
    report.html in the folder."""
    show_answers: bool = False
    """Show answers to harmful requests that are no refusals, too. Without it they are counted."""
    figures: bool = True
    """Write each figure as PNG and PDF as well, with matplotlib."""

    def check(self) -> None:
        """Raise UserError for settings that make no sense."""
        if self.folder is None:
            raise UserError("there is no folder to report on", "ptst report DIR: that of a grid, study or evaluation")
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "does not exist"
            raise UserError(f"{self.folder} {what}", "give the folder of a grid, a study or an evaluation")
        if self.out is not None and self.out.suffix != ".html":
            raise UserError((Setting("out"), f" {self.out} is no page"), "give a path that ends in .html")

    @property
    def page(self) -> Path:
        assert self.folder is not None, "check() wants one"
        return self.out or self.folder / "report.html"
