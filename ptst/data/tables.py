"""CSV and TSV by the standard library: every cell is text exactly as it is written (`NA`, `null`, `1.0`, `true`)."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from ptst.data.columns import KNOWN
from ptst.data.files import MAX_LINE, Row, numbered_lines
from ptst.errors import UserError

csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # the module's own, 131,072, is less than a long document

Header = Callable[[Sequence[str], str], Sequence[str] | None]
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_HEADERS = frozenset((*KNOWN, "goal", "behavior", "target", "text", "conversations", "forbidden_prompt", "adversarial"))
_NAMED = re.compile(r'\s*"?sep=([,;|\t])"?\s*')  # Excel's first line


def names(cells: Sequence[str], place: str) -> Sequence[str]:
    """The names of the columns in a file's first row. Raises UserError for one that comes twice."""
    found = [cell.strip() for cell in cells]
    if twice := [name for name, number in Counter(found).items() if name and number > 1]:
        raise UserError(f"the column {twice[0]!r} comes twice", "rename one", place)
    return found


def read_table(path: Path, delimiter: str = ",", header: Header = names, bare: str = "") -> Iterator[Row]:
    """The rows of a CSV, or of a TSV with the same quotes around cells that hold a tab. Rows may have several lines;
    blank lines between them are skipped. A first line `sep=;` names another separator, as in Excel. `header`: the
    columns' names from the first row, None where that is data already, of one column named `bare`. Above `names`, lines
    of one cell that begin with "# " are comments.

    Raises UserError, with the line that the row begins in, for a row with more or fewer cells than there are columns,
    for quotes that do not fit, and as `numbered_lines`."""
    # strict, lest an unclosed quote swallow the rest of the file.
    pieces = _pieces(path)
    if named := _NAMED.fullmatch(first := next(pieces, "")):
        delimiter = named[1]
    reader = csv.reader(pieces if named else chain([first], pieces), delimiter=delimiter, strict=True)
    columns: Sequence[str] | None = None
    line = above = 2 if named else 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + above
            if not cells or (columns is None and header is names and len(cells) == 1 and cells[0].startswith("# ")):
                continue
            if columns is None:
                _check_separator(cells, delimiter, place, bare)
                columns = header(cells, place)
                if columns is not None:
                    continue
                columns = [bare]
            if len(cells) != len(columns):
                cause = f"{len(cells)} cell{'s' * (len(cells) != 1)}, not {len(columns)} as in the header"
                more = f"put double quotes around text with {_SEPARATORS[delimiter]}"
                remedy = more if len(cells) > len(columns) else "an empty cell needs its separator, too"
                raise UserError(cause, remedy, place)
            yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        if columns is None:
            _check_separator([first], delimiter, f"{path}:{line}", bare)
        remedy = (
            'a cell that begins with a quote ends at the next one; write a quote inside it twice, as in "a ""b"" c"'
        )
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise UserError(f"not valid {kind} ({error}) in the row that begins here", remedy, f"{path}:{line}") from None


def _check_separator(cells: Sequence[str], delimiter: str, place: str, bare: str) -> None:
    """Raise UserError for a first row in one piece that another separator divides into names of columns: anything,
    unless a `bare` column can stand there."""
    for other, name in _SEPARATORS.items() if len(cells) == 1 else ():
        parts = [part.strip(' "\r\n').lower() for part in cells[0].split(other)]
        names = not (bare and _HEADERS.isdisjoint(parts)) or all(re.fullmatch(r"[\w-]+", part) for part in parts)
        if len(parts) > 1 and names and other != delimiter:
            named = {"\t": "name it .tsv", ",": "name it .csv"}.get(other, f"put the line sep={other} above them")
            remedy = f"save the file with {_SEPARATORS[delimiter]}, or {named}"
            raise UserError(f"the columns are separated by {name}", remedy, place)


def _pieces(path: Path) -> Iterator[str]:
    """The lines of the file, divided also where a carriage return alone ends one."""
    for _, line in numbered_lines(path):
        if "\r" in line[:-2]:
            yield from re.split(r"(?<=\r)(?!\n)", line)
        else:
            yield line
