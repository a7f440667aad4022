"""Prompts of a user's file: CSV, TSV, JSONL, JSON, Parquet or TXT, also packed by gzip, each prompt exactly as written
and each mistake with its line. Also what a prompt is, and how a limit is spread over the categories."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from ptst.data.columns import Cells, ColumnRules
from ptst.data.files import Row, kind_of, numbered_lines, stem_of
from ptst.data.json_rows import Number, read_json, read_jsonl
from ptst.data.layouts import asked_text
from ptst.data.messages import open_transcript
from ptst.data.tables import names, read_table
from ptst.data.typed import read_parquet
from ptst.errors import Setting, UserError


@dataclass(frozen=True)
class SafetyPrompt:
    """One prompt with its category (malware, drug, phishing, disinfo in the built-in sets) and family. `request`: what
    is judged, where that is not the prompt, such as the bare goal of a prompt with an adversarial suffix."""

    id: str
    prompt: str
    category: str = ""
    family: str = ""
    request: str = ""


def interleave(prompts: Iterable[SafetyPrompt], *kinds: str) -> list[SafetyPrompt]:
    """One prompt of each kind in turn (`kinds`: fields of a prompt); those of one kind, by the next field."""
    if not kinds:
        return list(prompts)
    groups: dict[str, list[SafetyPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(getattr(prompt, kinds[0]), []).append(prompt)
    turns = zip_longest(*(interleave(group, *kinds[1:]) for group in groups.values()))
    return [prompt for turn in turns for prompt in turn if prompt is not None]


# Names of the prompt column; the first of these that the file has.
PROMPT_COLUMNS = (
    *("prompt", "goal", "behavior", "question", "instruction", "text", "forbidden_prompt", "turns"),
    *("vanilla", "adversarial"),
)
# What prompt sets have besides: answers, and what people or judges said of them.
_NOT_ASKED = re.compile(
    r"goal|behavior|targets?|answer|output|reference|focus|note|tags|jailbroken\w*|annotation_\d|is_\w*safe"
    r"|number_of_queries|queries_to_jailbreak|(\w+_)?(response|completion|label|agreement)(_\d)?"
)


def read_prompts(
    path: str | Path, rules: ColumnRules | None = None, unused: Counter[str] | None = None
) -> list[SafetyPrompt]:
    """Prompts of a CSV, TSV, JSONL, Parquet, JSON (one list, or JailbreakBench's object of `jailbreaks`) or TXT (one
    prompt a line) file in UTF-8, in the file's order.

    The prompt column is the first of `PROMPT_COLUMNS` that the file's first row has, in upper or lower case; what
    belongs to it (`input`, `context`, HarmBench's ContextString) is read with it. Category (or type, as XSTest calls
    it), family and id are taken where they exist, and a row without an id is named "<file stem>-<row number>". A row
    with both prompt and goal is judged by its goal (JailbreakBench's prompts with suffixes), one with an adversarial
    form by its vanilla one (WildJailbreak). `turns` is a list of one text (SORRY-Bench). A CSV of one column whose
    first line is more than one word has no header (AdvBench's form): every row is a prompt. Prompts are kept exactly,
    outer spaces too; blank lines between rows are skipped.

    Raises UserError, with file and line, for anything that cannot be read, for a row without a prompt, and for columns
    that may belong to the prompt and are not read (`rules`: what the user says of them)."""
    path, rules = Path(path), rules or ColumnRules()
    header = partial(_header, rules=rules)
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".csv": partial(read_table, header=header, bare=PROMPT_COLUMNS[0]),
        ".tsv": partial(read_table, delimiter="\t", header=header, bare=PROMPT_COLUMNS[0]),
        ".jsonl": read_jsonl,
        ".json": read_json,
        ".parquet": read_parquet,
        ".txt": _read_txt,
    }
    read = readers.get(kind_of(path))
    if read is None:
        cause = f"prompts are read from {', '.join(readers)} files, recognized by the ending of the name"
        raise UserError(cause, where=path)
    prompts = to_prompts(read(path), stem_of(path), rules, unused)
    if not prompts:
        raise UserError("the file holds no prompts", "give a file with at least one", path)
    return prompts


def to_prompts(
    rows: Iterable[Row], stem: str, rules: ColumnRules | None = None, unused: Counter[str] | None = None
) -> list[SafetyPrompt]:
    """Prompts of rows; those without an id are named after `stem`. Columns that are not read are counted in `unused`.
    Raises UserError as `read_prompts`."""
    rules, unused = rules or ColumnRules(), Counter() if unused is None else unused
    prompts: list[SafetyPrompt] = []
    column = None
    for place, row in rows:
        cells = Cells(row, place, rules, unused)
        column = column or _prompt_column(place, row, rules)
        prompt = cells.get(column)
        if column == "turns" and isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str) or isinstance(prompt, Number) or not prompt.strip():
            raise UserError(f"{column!r} is missing, empty or not text", "give it a prompt or delete the row", place)
        if open_transcript(prompt):
            cause = f"{column!r} is a transcript (Human:, Assistant:), and prompts are asked as they are written"
            raise UserError(cause, "give the question alone", place)
        asked = prompt if column == "turns" else asked_text(cells, column)
        if lone := re.search(r"[\ud800-\udfff]", asked):
            cause = f"the prompt holds a lone surrogate, U+{ord(lone[0]):04X}, at character {lone.start()}"
            raise UserError(cause, "remove it", place)
        name = _label(cells, "id", "behaviorid") or f"{stem}-{len(prompts) + 1}"
        category = _label(cells, "category", "type", "semanticcategory", "data_type")
        goal = _label(cells, "goal") if column == "prompt" else ""
        if column == "vanilla" and asked != prompt:
            goal = prompt
        family = _label(cells, "family")
        flags = (name.strip().lower() for name, value in row.items() if isinstance(value, bool))  # no words to ask
        cells.check_rest(partial(tuple, [asked]), [*filter(_NOT_ASKED.fullmatch, cells.filled), *flags])
        prompts.append(SafetyPrompt(name, asked, category, family, goal))
    return prompts


def _prompt_column(place: str, columns: Iterable[str], rules: ColumnRules) -> str:
    found = [name.strip().lower() for name in columns]
    found = [rules.names.get(name, name) for name in found if name not in rules.ignored]
    column = next((c for c in PROMPT_COLUMNS if c in found), None)
    if column is None:
        cause = f"the prompt must be named one of {', '.join(PROMPT_COLUMNS)}; the names here are {', '.join(columns)}"
        raise UserError(cause, ("name it with ", Setting("columns"), ", as in prompt=request"), place)
    return column


def _label(cells: Cells, *columns: str) -> str:
    """The first of these optional cells that is there, as text: ids are often numbers, and 0 is one. Of BeaverTails'
    categories, {name: whether it is one}, those that are; of a list, all."""
    value = next((cells.get(name) for name in columns if name in cells.filled), "")
    if isinstance(value, dict):
        value = [name for name, holds in value.items() if holds]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _header(cells: Sequence[str], place: str, rules: ColumnRules) -> Sequence[str] | None:
    # One word above a single column is its name, not a prompt.
    if len(cells) == 1 and re.fullmatch(r"\s*\w+\s*", cells[0]) is None:
        return None
    _prompt_column(place, cells, rules)
    return names(cells, place)


def _read_txt(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line.rstrip("\r\n")}
