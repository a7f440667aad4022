"""Names of data as others may read them: ids of the hub, names of built-in sets, and file names without their folders,
which are private."""

import re
from pathlib import PurePath

from ptst.data.files import kind_of
from ptst.data.prompt_sets import NAMED as PROMPT_SETS
from ptst.data.readers import KINDS
from ptst.data.sources import NAMED, is_hub_id


def data_name(name: str) -> str:
    """A source as it is shown: of every file in it the name alone."""
    return ",".join(_file_name(part) for part in name.split(","))


def _file_name(part: str) -> str:
    head, colon, rest = part.partition(":")
    if colon and "/" not in head and "\\" not in head:  # NAME:FILE
        return f"{head}:{_file_name(rest)}"
    path, _, epochs = part.partition(":")
    if kind_of(path) in KINDS or PurePath(path).is_absolute():
        return PurePath(path).name + (f":{epochs}" if epochs else "")
    return part


def dataset_id(name: str) -> str | None:
    """The id on the hub of a source that was read from there, else None: of a file, also of a named set's layout."""
    base, rest = re.split("[:@]", name, maxsplit=1)[0], name.partition(":")[2]
    named = NAMED.get(base, {}).get("train") or PROMPT_SETS.get(base)
    if named is not None:
        return named.repository if not rest or re.fullmatch(r"\d+(@[\w./-]+)?", rest) else None
    found = is_hub_id(name)
    return found["repository"] if found else None
