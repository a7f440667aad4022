"""Settings of the analysis of a study."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ptst.errors import Setting, UserError
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class StudyConfig(CommandSettings):
    """Gather the outcomes of a study or of grids into one compact file, and compute tables, contrasts and figure."""

    source: Positional[tuple[Path, ...]] = ()
    """Folder of a study (ptst grid --recipe ladder), folders of grids, or one file of outcomes."""
    judge: str | None = None
    """Judge whose verdicts are counted. Default: the study's."""
    out: Path | None = None
    """Folder for outcomes.json, report.md and ladder.svg. Default: the source's."""
    docs: Path | None = None
    """Folder of pages: write the marked tables in them anew, from the files in its folder outcomes (docs/study.md)."""

    def check(self) -> None:
        """Raise UserError for settings that make no sense."""
        if bool(self.source) == (self.docs is not None):
            cause = "there are two things to do" if self.source else "there is nothing to do"
            raise UserError(cause, ("give folders or a file of outcomes, or pages as ", Setting("docs")))
        for name in ("out", "judge"):
            if getattr(self, name) is not None and self.docs is not None:
                raise UserError((Setting(name), " has no effect on pages"), "leave it out")
        for path in (*self.source, *([self.docs] if self.docs else [])):
            if not path.exists():
                raise UserError(f"there is no file or folder {path}")
        for name in ("out", "docs"):
            path = getattr(self, name)
            if path is not None and path.exists() and not path.is_dir():
                raise UserError((Setting(name), f" {path} is a file"), "name a folder")
