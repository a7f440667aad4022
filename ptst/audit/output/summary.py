"""What files for other programs say of a report, whatever was audited; and their writing."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ptst.audit.findings import Finding
from ptst.errors import Setting, UserError
from ptst.storage import write_atomically


class Summary(Protocol):
    """A report: the model's and the data's names, and all findings, most severe first."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def findings(self) -> list[Finding]: ...


def write_files(report: Summary, junit: Path | None, sarif: Path | None) -> None:
    """Write the report as JUnit XML and as SARIF where a path is given. Raises UserError where that fails."""
    from ptst.audit.output.junit import to_junit
    from ptst.audit.output.sarif import to_sarif

    files: list[tuple[str, Path | None, Callable[[Summary], bytes]]]
    files = [("junit", junit, to_junit), ("sarif", sarif, to_sarif)]
    for setting, path, contents in files:
        if path is None:
            continue
        try:
            write_atomically(path, contents(report))
        except OSError as error:
            cause = (Setting(setting), f" {path} cannot be written ({error.strerror})")
            raise UserError(cause, "choose another path") from None
