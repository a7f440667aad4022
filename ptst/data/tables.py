"""CSV and TSV by the standard library: every cell is text exactly as it is written (`NA`, `null`, `1.0`, `true`)."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ptst.data.columns import KNOWN
from ptst.data.files import MAX_LINE, Row, numbered_lines
from ptst.errors import UserError

csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # the module's own, 131,072, is less than a long document

Header = Callable[[Sequence[str], str], Sequence[str] | None]
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_HEADERS = frozenset((*KNOWN, "goal", "behavior", "target", "text", "conversations", "chosen"))


def names(cells: Sequence[str], place: str) -> Sequence[str]:
    """The names of the columns in a file's first row. Raises UserError for one that comes twice."""
    found = [cell.strip() for cell in cells]
    if twice := [name for name, number in Counter(found).items() if name and number > 1]:
        raise UserError(f"the column {twice[0]!r} comes twice", "rename one", place)
    return found


def read_table(path: Path, delimiter: str = ",", header: Header = names, bare: str = "") -> Iterator[Row]:
    """The rows of a CSV, or of a TSV with the same quotes around cells that hold a tab. Rows may have several lines;
    blank lines between them are skipped. `header`: the columns' names from the first row, None where that is data
    already, of one column named `bare`.

    Raises UserError, with the line that the row begins in, for a row with more or fewer cells than there are columns,
    for quotes that do not fit, and as `numbered_lines`."""
    # strict, lest an unclosed quote swallow the rest of the file.
    reader = csv.reader(_pieces(path), delimiter=delimiter, strict=True)
    columns: Sequence[str] | None = None
    line = 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if columns is None:
                _check_separator(cells, delimiter, place)
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
            _check_separator([next(_pieces(path))], delimiter, f"{path}:{line}")
        remedy = (
            'a cell that begins with a quote ends at the next one; write a quote inside it twice, as in "a ""b"" c"'
        )
        kind = "CSV" if delimiter == "," else "TSV"
        raise UserError(f"not valid {kind} ({error}) in the row that begins here", remedy, f"{path}:{line}") from None


def _check_separator(cells: Sequence[str], delimiter: str, place: str) -> None:
    """Raise UserError for a first row in one piece that another separator divides into names of columns."""
    if len(cells) != 1:
        return
    for other, name in _SEPARATORS.items():
        parts = [part.strip(' "\r\n').lower() for part in cells[0].split(other)]
        if len(parts) > 1 and not _HEADERS.isdisjoint(parts):
            right = _SEPARATORS[delimiter]
            kind = ", or name it .tsv" if other == "\t" else ", or name it .csv" if other == "," else ""
            raise UserError(f"the columns are separated by {name}", f"save the file with {right}{kind}", place)


def _pieces(path: Path) -> Iterator[str]:
    """The lines of the file, divided also where a carriage return alone ends one."""
    for _, line in numbered_lines(path):
        if "\r" in line[:-2]:
            yield from re.split(r"(?<=\r)(?!\n)", line)
        else:
            yield line
