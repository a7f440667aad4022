"""The files that a name of data means: one, several with commas between them, those of a folder, or of a pattern."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ptst.data.files import kind_of
from ptst.errors import UserError

_WILD = "*?["
_LISTED = 5  # names in a sentence


def is_several(name: str) -> bool:
    """Whether a name is spelled as a folder (`rows/`, or any that is there) or a pattern (`rows/*.jsonl`)."""
    return not Path(name).is_file() and (any(sign in name for sign in _WILD) or Path(name).is_dir())


def data_files(names: str, kinds: tuple[str, ...]) -> list[Path]:
    """The files, those of a folder or pattern in the order of their names. `kinds`: endings of data files.

    Raises UserError for an empty name, a pattern that no file fits, a folder without data files or with several kinds
    of them, and a file of either that is named again. Whether the others are there is not looked at."""
    parts = [names] if names and Path(names).exists() else [part.strip() for part in names.split(",")]
    if not all(parts):  # it would be the folder that this runs in
        raise UserError(f"a name of a file is missing in {names!r}", "write a file, folder or pattern between commas")
    found = [(path, is_several(part)) for part in parts for path in _files(part, kinds)]
    counts = Counter(path for path, _ in found)
    if twice := next((path for path, unfolded in found if unfolded and counts[path] > 1), None):
        raise UserError(f"the file {twice} is named twice in {names}", "name it once: its rows would come twice")
    return [path for path, _ in found]


def _files(name: str, kinds: tuple[str, ...]) -> Iterator[Path]:
    if not is_several(name):
        yield Path(name)
    elif Path(name).is_dir():
        yield from _of_folder(Path(name), kinds)
    else:
        found = sorted(_matches(name))
        if not found:
            raise UserError(f"no file fits {name}", f"check the pattern, as in rows/*{kinds[0]}")
        yield from found


def _matches(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    base = Path(path.anchor) if path.anchor else Path()
    try:
        for found in base.glob(str(path.relative_to(path.anchor))):
            if found.is_file() and (_is_hidden(path) or not _is_hidden(found)):
                yield found
    except ValueError as error:  # ** inside a name, say
        raise UserError(f"{pattern} is no pattern of files ({error})", "write it as in rows/*.jsonl") from None


def _is_hidden(path: Path) -> bool:
    """Whether a name in it begins with a dot; a pattern that has such a name asks for hidden files."""
    return any(part.startswith(".") and part.strip(".") for part in path.parts)


def _of_folder(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    own = [path for path in files if kind_of(path) in kinds]
    found = sorted({kind_of(path) for path in own})
    if len(found) > 1:
        remedy = f"say which, as in {folder}/*{found[0]}"
        raise UserError(f"the folder holds {' and '.join(found)} files", remedy, folder)
    if not own:
        there = f" ({', '.join(path.name for path in files[:_LISTED])})" if files else ""
        remedy = f"those are {', '.join(kinds)}"
        raise UserError(f"is a folder, not a file, and no data file is in it{there}", remedy, folder)
    return own
