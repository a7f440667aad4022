"""The texts that are asked at test time, read a second time: spoiled prompt sets would hide training rows that are also
in a test.

Shares nothing with `ptst.data.prompt_files`; the texts are compared as the rule `overlap` compares them, without case,
extra spaces and punctuation at the ends.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ptst.audit.findings import Finding
from ptst.audit.reference.columns import Columns, Record, Refused, Unknown
from ptst.audit.reference.files import ending, file_rows, text_lines
from ptst.audit.reference.layouts import question_text

_BUILT_IN = Path(__file__).parents[2] / "data/builtin"
_SETS = ("harmful_requests.jsonl", "look_alikes.jsonl", "fresh_requests.jsonl", "fresh_look_alikes.jsonl")
_COLUMNS = (
    *("prompt", "goal", "behavior", "question", "instruction", "text", "forbidden_prompt", "turns"),
    *("vanilla", "adversarial"),
)


def check_asked(asked: Iterable[str], prompts: Path | None, columns: Columns) -> Iterator[Finding]:
    """Rule `asked-differs`: the built-in safety sets, and those of the file `prompts`, are among the texts `asked`."""
    known = set(asked)
    sets = {name: [str(row.cells["prompt"]) for row in file_rows(_BUILT_IN / name) if row.cells] for name in _SETS}
    if prompts is not None:
        try:
            sets[str(prompts)] = list(prompt_texts(prompts, columns))
        except (Refused, Unknown, ValueError, LookupError) as reason:
            yield Finding("rows-unchecked", "", f"the prompts of {prompts} were not read a second time ({reason})")
    for name, texts in sets.items():
        missing = [text for text in texts if plain(text) not in known]
        if missing:
            cause = f"{len(missing)} of {len(texts)} prompts of {name} are not among the texts of the test"
            yield Finding("asked-differs", name, cause, expected=repr(missing[0][:60]), seen="nothing")


def prompt_texts(path: Path, columns: Columns) -> Iterator[str]:
    """The prompts of a file, each with what is read together with it. Raises Refused and Unknown."""
    if ending(path) == "txt":
        yield from text_lines(path)
        return
    column = ""
    for row in file_rows(path, bare="prompt"):
        if row.cells is None:
            raise Refused(f"{row.place}: {row.cause}")
        record = Record(row.cells, columns)
        column = column or next((c for c in _COLUMNS if c in _names(row.cells, columns)), "")
        if not column:
            raise Unknown("there is no column of prompts")
        value = record.value(column)
        if column == "turns" and isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            yield value[0]
        else:
            yield question_text(record, column)


def _names(heads: Iterable[str], columns: Columns) -> list[str]:
    names = (head.strip().lower() for head in heads)
    return [columns.names.get(name, name) for name in names if name not in columns.ignored]


def plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(".?! ")
