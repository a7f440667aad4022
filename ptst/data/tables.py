"""CSV and TSV by the standard library: every cell is text exactly as it is written (`NA`, `null`, `1.0`, `true`)."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ptst.data.files import MAX_LINE, Row, numbered_lines
from ptst.errors import UserError

csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # the module's own, 131,072, is less than a long document

Header = Callable[[Sequence[str], str], Sequence[str] | None]


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
                columns = header(cells, place)
                if columns is not None:
                    continue
                columns = [bare]
            if len(cells) != len(columns):
                cause = f"{len(cells)} cells, not {len(columns)} as in the header"
                separator = "commas" if delimiter == "," else "tabs"
                raise UserError(cause, f"put double quotes around text with {separator}", place)
            yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        remedy = "correct the quotes of the row that begins here"
        kind = "CSV" if delimiter == "," else "TSV"
        raise UserError(f"not valid {kind} ({error})", remedy, f"{path}:{line}") from None


def _pieces(path: Path) -> Iterator[str]:
    """The lines of the file, divided also where a carriage return alone ends one."""
    for _, line in numbered_lines(path):
        if "\r" in line[:-2]:
            yield from re.split(r"(?<=\r)(?!\n)", line)
        else:
            yield line
