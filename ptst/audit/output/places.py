"""Where a finding is in the user's files: the `file:line` of its row as a file and a line number."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ptst.audit.findings import Finding

_PLACE = re.compile(r"(?s)(.+):(\d+)")


class Place(NamedTuple):
    """`uri`: relative to the working folder where the file lies in it; forward slashes, percent-encoded. `line`: from
    1 on; None for the whole file."""

    uri: str
    line: int | None


def place_of(finding: Finding, data: str = "") -> Place | None:
    """The place of a finding: its row's line, else the data file (`data`) as a whole, if there is one."""
    found = _PLACE.fullmatch(finding.row)
    if found is not None and _is_file(found[1]):
        return Place(_uri(Path(found[1])), max(1, int(found[2])))
    name = next((name for name in (finding.row, data) if name and _is_file(name)), None)
    return None if name is None else Place(_uri(Path(name)), None)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _uri(path: Path) -> str:
    here, whole = Path.cwd(), path.absolute()
    own = whole.relative_to(here).as_posix() if whole.is_relative_to(here) else None
    encoded = quote((own or whole.as_posix()).encode("utf-8", "surrogateescape"))
    return encoded if own is not None else f"file://{encoded}"
