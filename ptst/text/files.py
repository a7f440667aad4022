"""Small JSON files of a model folder that may be absent."""

from __future__ import annotations

import json
from pathlib import Path


def optional_json(path: Path) -> dict:
    """The parsed object, or {} where there is no such file. Raises ValueError for a broken one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object; fetch the file again")
    return value
