"""Tensors of safetensors files, read straight into their place.

Where the values on disk have the wanted type, they are read into the tensor's own memory; otherwise through a buffer
of a few MiB, which is used again. (Copies out of a mapped file take twice as long: each page of it is a fault, and so
is each new page.) Two threads read, so that one copies while the disk serves the other.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ptst.errors import UserError
from ptst.reading import open_regular, read_header

PIECE = 2**23  # bytes that are read at a time
THREADS = 2


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weights file: its name there, and what the file says of it."""

    name: str
    path: Path
    shape: torch.Size
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.shape.numel()


class TensorFile:
    """A safetensors file that is open. Raises UserError if it is missing or damaged; a file that was checked by the
    library before has no other faults."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open_regular(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        try:
            described, begin = read_header(self._file, path), self._file.tell()
            self._offsets = {k: begin + v["data_offsets"][0] for k, v in described.items() if k != "__metadata__"}
        except UserError:
            self.close()
            raise
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            self.close()
            raise self._damaged() from None

    def close(self) -> None:
        self._file.close()

    def offset(self, name: str) -> int:
        """Where the values of a tensor begin, in bytes from the beginning of the file."""
        if name not in self._offsets:
            raise self._damaged()
        return self._offsets[name]

    def read(self, offset: int, into: memoryview) -> None:
        """Fill a buffer with the bytes at `offset`."""
        while into.nbytes:
            count = os.preadv(self._file.fileno(), [into], offset)
            if not count:
                raise self._damaged()
            into, offset = into[count:], offset + count

    def _damaged(self) -> UserError:
        return UserError("truncated or damaged", "fetch the file again", self.path)


class Reader:
    """Reads tensors by threads of its own; used in a `with` statement, at whose end all have their values.

    Raises UserError, at the latest there, for a file that is missing or ends too early."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "read-weights")
        self._files: dict[Path, TensorFile] = {}
        self._left: list[Future[None]] = []
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
            for file in self._files.values():
                file.close()

    def in_file_order(self, stored: Mapping[str, StoredTensor]) -> list[str]:
        """The keys of tensors in the order in which they lie on the disk, file by file."""
        return sorted(stored, key=lambda key: (stored[key].path, self._open(stored[key].path).offset(stored[key].name)))

    def read(self, stored: StoredTensor, into: Tensor, row: int = 0, via: torch.dtype | None = None) -> None:
        """Begin to read a tensor's values, from `row` on, into a contiguous tensor, as many as that has. `via`: a type
        that they are rounded to before."""
        file, size, via = self._open(stored.path), stored.dtype.itemsize, via or stored.dtype
        begin, flat = file.offset(stored.name) + row * stored.shape[1:].numel() * size, into.view(-1)
        straight = into.device.type == "cpu" and stored.dtype == into.dtype == via
        for start in range(0, len(flat), PIECE // size):
            part, offset = flat[start : start + PIECE // size], begin + start * size
            if straight:
                self._left.append(self._pool.submit(file.read, offset, _bytes_of(part)))
            else:
                self._left.append(self._pool.submit(self._convert, file, offset, stored.dtype, part, via))

    def wait(self) -> None:
        """Until everything that was begun has been read."""
        left, self._left = self._left, []
        for future in left:
            future.result()

    def _open(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def _convert(self, file: TensorFile, offset: int, stored: torch.dtype, into: Tensor, via: torch.dtype) -> None:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(PIECE, dtype=torch.uint8)
        held = self._own.buffer[: len(into) * stored.itemsize]
        file.read(offset, _bytes_of(held))
        into.copy_(held.view(stored).to(via))


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a tensor."""
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)
