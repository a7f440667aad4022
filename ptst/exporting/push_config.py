"""Settings of an upload to the hub."""

from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.exporting.config import CardSettings
from ptst.hub.push import check_repo
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class PushConfig(CommandSettings, CardSettings):
    """Upload a run, or a folder that ptst export wrote, to a model repository of the hub, with its card. Answers are
    never uploaded. The token comes from HF_TOKEN, or from the login (hf auth login)."""

    checkpoint: Path | None = None
    """Run folder of ptst.train, RUN/epoch-2, or a folder of ptst.export. Default: the latest run."""
    repo: str | None = None
    """Repository: org/name or user/name. It is made where there is none; other files in it stay."""
    revision: str | None = None
    """Branch of the repository, made where there is none. Default: its main branch."""
    private: bool = True
    """A new repository is private, and an existing one must be. --no-private makes a new one public, and takes a
    public one."""
    message: str | None = None
    """Message of the commit. Default: what was uploaded."""
    dry_run: bool = False
    """List the files that would be uploaded and exit; nothing is sent, and no token is needed."""
    yes: bool = False
    """Upload without asking."""

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        if self.repo is None:
            raise UserError((Setting("repo"), " is missing"), "give org/name or user/name")
        check_repo(self.repo)
        self.check_license()
