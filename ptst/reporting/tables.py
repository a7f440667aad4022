"""A table as LaTeX (booktabs) and as CSV."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ptst.experiment.tables import no_formula
from ptst.progress import printable

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': "''",
    "\u00b1": r"$\pm$",
    "\u2212": "$-$",
    "\u2192": r"$\rightarrow$",
    "\u2014": "---",
    "\u2013": "--",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


@dataclass(frozen=True)
class Table:
    """`name`: of its files; `bold`: (row, column) of cells in bold; `numbers`: the first column that is set to the
    right; `values`: head and rows of the CSV, where they are not those that are shown."""

    name: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    numbers: int = 1
    values: tuple[Sequence[str], Sequence[Sequence[object]]] | None = field(default=None, repr=False)

    def to_latex(self) -> str:
        """A floating table, which needs the package booktabs."""
        columns = "".join("l" if i < self.numbers else "r" for i in range(len(self.head)))
        lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
        label = re.sub("[^a-z0-9-]", "-", self.name.lower())
        lines += [rf"\caption{{{latex(self.caption)}}}", rf"\label{{tab:{label}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(list(map(latex, self.head))), r"\midrule"]
        for i, row in enumerate(self.rows):
            lines.append(_row([_bold(latex(c)) if (i, j) in self.bold else latex(c) for j, c in enumerate(row)]))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def to_csv(self) -> str:
        """Text that a spreadsheet would take for a formula has an apostrophe in front; numbers stay numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head, rows = self.values or (self.head, self.rows)
        for row in (head, *rows):
            writer.writerow(["" if c is None else no_formula(c) if isinstance(c, str) else c for c in row])
        return text.getvalue()


def latex(text: str) -> str:
    """Text in LaTeX: no character of it commands anything."""
    words = _SPECIAL.sub(lambda found: _LATEX[found[0]], printable(" ".join(text.split())))
    # Letters beyond Latin have no glyph in LaTeX's own fonts, and would stop it.
    return re.sub("[^\x00-\u017f]", lambda found: f"U+{ord(found[0]):04X}", words)


def _bold(text: str) -> str:
    return rf"\textbf{{{text}}}"


def _row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket would be read as the length of the line break before it.
    first = "{}" if cells and cells[0].startswith(("[", "*")) else ""
    return f"{first}{' & '.join(cells)} \\\\"
