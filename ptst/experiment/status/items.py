"""What there is to do in a folder, and how much of it: `plan.json`, which workers write and `ptst status` reads.

Amounts are in tokens of one forward pass of the model, whatever it is that is computed: training on a token counts as
two or three of them, a decoding step has a cost of its own besides its tokens. So one measured speed says something of
everything else, until that is measured itself (`ptst.experiment.status.forecast`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ptst.errors import UserError
from ptst.records import read_json
from ptst.storage import LOCKS, lock, remove_partial_files_of, write_json

PLAN = "plan.json"
VERSION = 1
Kind = Literal["align", "train", "test"]


@dataclass(frozen=True)
class Item:
    """An alignment, a run or a cell. `alike`: what it shares its speed with, the defence of a run or the task of a
    cell. `fixed`: tokens that are computed in any case; `answers`: tokens of answers at most; `steps`: the cost of
    decoding steps at most, in tokens; `before`: tokens that a run reads before its first step. `parts`: optimizer
    steps, or prompts. Of a cell: `model`, `needs`, the run whose weights it takes, `loads`, how these come into memory
    ("": they are there with the base model), and `length`, the share of `answers` that its training data suggest."""

    kind: Kind
    name: str
    alike: str = ""
    fixed: float = 0.0
    answers: float = 0.0
    steps: float = 0.0
    before: float = 0.0
    parts: int = 0
    tokens: int = 0
    model: str = ""
    needs: str = ""
    loads: str = ""
    length: float | None = None

    @property
    def what(self) -> str:
        """`train chat-vanilla.seed0`: its name in estimates and on displays."""
        return f"{self.kind} {self.name}"

    def amount(self, share: float) -> float:
        """Tokens to compute, if answers have this share of their greatest length. The longest of them, which decides
        how many steps there are, is longer."""
        return self.fixed + share * self.answers + share**0.5 * self.steps


Items = Mapping[str, Item]  # by `what`


def by_name(items: Iterable[Item]) -> dict[str, Item]:
    return {item.what: item for item in items}


def read_items(folder: Path) -> dict[str, Item]:
    """What the workers on a folder wrote that there is to do; nothing where they did not (earlier versions). Raises
    UserError for a file that is damaged."""
    path = folder / PLAN
    if not path.exists():
        return {}
    values = read_json(path, _REMEDY)
    rows = values.get("items") if isinstance(values, dict) else None
    if not isinstance(rows, list):
        raise UserError("is not a plan", _REMEDY, path)
    return by_name(item_of(row, path) for row in rows)


def add_items(folder: Path, items: Items) -> dict[str, Item]:
    """Write what there is to do into a folder, beside what others wrote there; returns all of it."""
    with lock(folder / LOCKS, "plan", wait=True):
        try:
            known = read_items(folder)
        except UserError:  # it is only an estimate's, and made anew
            known = {}
        found = known | dict(items)
        if found != known:
            remove_partial_files_of(folder / PLAN)
            write_json(folder / PLAN, {"version": VERSION, "items": [row_of(item) for item in found.values()]})
    return found


_REMEDY = "remove it: the next worker writes it anew"
_NAMES = {f.name: f.default for f in fields(Item)}


def row_of(item: Item) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if value != _NAMES[name]}


def item_of(row: Any, path: Path) -> Item:
    known = {k: v for k, v in row.items() if k in _NAMES} if isinstance(row, dict) else {}
    numbers = ("fixed", "answers", "steps", "before", "parts", "tokens")
    sound = known.get("kind") in ("align", "train", "test") and isinstance(known.get("name"), str)
    if not sound or not all(isinstance(known.get(name, 0), int | float) for name in numbers):
        raise UserError("is not a plan: an entry has no kind, no name or no amount", _REMEDY, path)
    return Item(**known)
