"""Settings of `ptst status`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ptst.errors import Setting, UserError
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class StatusConfig(CommandSettings):
    """Tell where a grid, study, training run, evaluation or alignment is, from any terminal. Only reads its folder."""

    folder: Positional[Path | None] = None
    """Folder of a grid, a study, a run, an evaluation or an alignment, or one that holds several of these."""
    names: bool = False
    """Name everything that is left, too."""
    every: float | None = None
    """Tell it again after so many seconds, until it has finished or nobody is at work any more."""

    def check(self) -> None:
        """Raise UserError for settings that make no sense."""
        if self.folder is None:
            raise UserError("there is no folder to look at", "give that of a grid, a study or a run")
        if self.every is not None and not 0 < self.every < float("inf"):
            raise UserError((Setting("every"), f" is {self.every:g}"), "it must be a number of seconds above 0")
