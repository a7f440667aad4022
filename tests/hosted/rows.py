"""Small training data."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(path: Path, rows: int = 12, **columns: str) -> Path:
    """A JSONL file whose columns are filled with each row's number `i` and its double `d`."""
    columns = columns or {"question": "What is {i} + {i}?", "answer": "It is <<{i}+{i}={d}>>{d}.\n#### {d}"}
    lines = [json.dumps({k: v.format(i=i, d=2 * i) for k, v in columns.items()}) for i in range(rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
