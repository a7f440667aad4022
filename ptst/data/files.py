"""Data files opened and read by lines, also those packed by gzip; archives and decompression bombs are refused."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.reading import open_regular, refuse_pointer

Row = tuple[str, dict[str, Any]]  # place ("file:line"), cells by name
MAX_LINE = 64 << 20  # bytes of a line
# gzip makes text 3 to 20 times smaller, and 1,000 times what was packed to fill a memory. Beyond FREE bytes, more than
# MAX_RATIO times is refused.
FREE, MAX_RATIO = 64 << 20, 100
# How archives begin. They are not unpacked: 50 MB of one can hold 100 GB.
_ARCHIVES = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!\x1a\x07",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # as Excel and Windows write "Unicode"
_TAR = slice(257, 262), b"ustar"


def kind_of(path: Path | str) -> str:
    """The kind of a file by its name, `.csv` of a.CSV and of a.csv.gz."""
    path = Path(path)
    kind = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    return ".jsonl" if kind in (".ndjson", ".jsonlines") else kind


def stem_of(path: Path) -> str:
    """The file's name without its kind and `.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).stem


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers and ends. Raises UserError, with the line, for one that is not
    UTF-8 or has more than 64 MB, and as `open_data`."""
    with open_data(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                remedy = "each line holds one row"
                raise UserError(f"the line has more than {MAX_LINE >> 20} MB", remedy, f"{path}:{number}")
            if b"\0" in line:
                raise UserError("the line has a zero byte, as UTF-16 has", "save the file as UTF-8", f"{path}:{number}")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise not_utf8(f"{path}:{number}") from None


def check_limit(limit: int | None, what: str) -> None:
    """Raise UserError for a limit on rows below 1."""
    if limit is not None and limit < 1:
        remedy = (f"at least 1 {what} is needed (leave ", Setting("limit"), " out for all)")
        raise UserError(("the ", Setting("limit"), f" is {limit}"), remedy)


def open_data(path: Path) -> Any:
    """The file, opened for bytes; that of a .gz file, unpacked as it is read. Raises UserError where that fails, for a
    pipe or device, for an archive, whatever its name, and for a pointer of Git LFS."""
    try:
        file: Any = open_regular(path)
        if path.suffix.lower() == ".gz":
            file = _open_gzip(file, path)
        head = file.peek(512)
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", "check the path", path) from None
    try:
        refuse_pointer(head, path)
    except UserError:
        file.close()
        raise
    kind = next((kind for kind, magic in _ARCHIVES.items() if head.startswith(magic)), None)
    if head.startswith(_UTF16):
        file.close()
        raise UserError("the file is UTF-16 text", "save it as UTF-8", path)
    if kind or head[_TAR[0]] == _TAR[1]:
        file.close()
        raise UserError(f"the file is an archive ({kind or 'tar'})", "unpack it first", path)
    return file


def _open_gzip(packed: Any, path: Path) -> io.BufferedReader:
    head = packed.peek(2)
    if head and not head.startswith(_ARCHIVES["gzip"]):
        packed.close()
        raise UserError("the file is not packed by gzip", "take .gz off its name, or pack it", path)
    return io.BufferedReader(_Unpacked(packed, path))


class _Unpacked(io.RawIOBase):
    """The content of a gzip file. Reading raises UserError for a damaged one, and for one that grows like a bomb."""

    def __init__(self, packed: Any, path: Path):
        self._packed, self._path, self._size = packed, path, 0
        self._file = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"the file is damaged ({error})", "fetch or pack it again", self._path) from None
        self._size += len(data)
        if self._size > max(FREE, MAX_RATIO * self._packed.tell()):
            cause = f"the file unpacks to more than {MAX_RATIO} times its size"
            raise UserError(cause, "unpack it first, if you trust it", self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._packed.close()
        super().close()


def not_utf8(place: str) -> UserError:
    return UserError("not UTF-8 text", "save the file as UTF-8", place)


def check_object(row: Any, place: str) -> dict[str, Any]:
    """Returns `row`. Raises UserError if it is not a JSON object."""
    if not isinstance(row, dict):
        raise UserError("the row is not an object", 'write it in braces, as in {"prompt": "..."}', place)
    return row
