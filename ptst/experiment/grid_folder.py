"""The files of a grid's cells: where they are, and what is in them once they are finished."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ptst import records
from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.experiment.plan import GridCell

_AGAIN = "remove it, and the cell is measured again"


class GridFolder:
    """A grid's folder, `out`, as far as it holds cells."""

    out: Path

    def cell_file(self, cell: GridCell, ending: str) -> Path:
        return self.out / "cells" / f"{cell.name}.{ending}"

    def is_measured(self, cell: GridCell) -> bool:
        return self.cell_file(cell, "json").exists()

    def cell_figures(self, cell: GridCell) -> dict[str, Any]:
        """Results and time of a finished cell. Raises UserError for a file that is damaged, or another cell's."""
        path = self.cell_file(cell, "json")
        figures = records.read_json(path, _AGAIN)
        known = {"defense": NONE, **figures} if isinstance(figures, dict) else {}
        if any(known.get(k, self) != v for k, v in {"defense": NONE, **cell.identity}.items()):
            raise UserError("is not the file of this cell", _AGAIN, path)
        result, spent = figures.get("result"), figures.get("time")
        numbers = all(isinstance(v, (int, float, dict)) for v in result.values()) if isinstance(result, dict) else False
        if not numbers or not isinstance(spent, dict) or not isinstance(spent.get("seconds"), (int, float)):
            raise UserError("is damaged: it has no result, or no time", _AGAIN, path)
        decoded = figures.get("decodings") or {}
        if not isinstance(decoded, dict) or not all(s.isdigit() and isinstance(r, dict) for s, r in decoded.items()):
            raise UserError("is damaged: its decodings have no results", _AGAIN, path)
        return figures

    def cell_rows(self, cell: GridCell) -> list[dict[str, Any]]:
        """The judged answers of a finished cell. Raises UserError for a file that is damaged, or another cell's."""
        path, figures = self.cell_file(cell, "rows.jsonl"), self.cell_file(cell, "json")
        again = f"remove {figures}, and the cell is measured again"
        try:
            raw = path.read_bytes()
            rows = [json.loads(line) for line in raw.split(b"\n")[:-1]]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot be read ({error})", again, path) from None
        checksum = self.cell_figures(cell).get("rows")  # of an earlier version: None
        if checksum not in (None, rows_checksum(raw)) or not all(isinstance(row, dict) for row in rows):
            raise UserError("does not hold the rows that the cell was measured with", again, path)
        return rows


def rows_checksum(raw: bytes) -> str:
    """Of a cell's file of judged answers."""
    return hashlib.sha256(raw).hexdigest()
