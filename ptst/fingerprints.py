"""Fingerprints of a model's files: xxh3 over every byte.

The fingerprint of a large file is kept in the user's cache, with the file's size, times and inode, so that it is read
once. The cache only saves time: without it, or with a damaged one, files are read again.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

import ptst
from ptst.progress import say
from ptst.storage import cache_home, write_atomically
from ptst.weight_files import ADAPTER, INDEX, find_weight_files

CACHE = "fingerprints.json"
WEIGHTS = (*ADAPTER, INDEX, "config.json")  # besides the files that the weights are read from
TOKENIZER: tuple[str, ...] = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER += ("added_tokens.json", "*.jinja", "additional_chat_templates/*.jinja", "generation_config.json")
_SEGMENT = 2**28  # bytes that one thread reads; part of the format
_BUFFER = 2**18
_KEPT_FROM = 2**20  # smaller files are read every time
_SETTLED = 2.0  # seconds: a file that changed later may change again within one tick of its times
_MAX_KEPT = 2000
_SLOW = 4e9  # bytes that take long enough to say so
_CODE = (".py", ".json", ".toml", ".jinja", ".txt")  # endings of what a package's code is and reads
Stamp = list[int]  # size, times of change of content and inode, inode


class Fingerprint(str):
    """The fingerprint of the weights in `folder`."""

    folder: Path

    def matches(self, recorded: str | None) -> bool:
        """Whether a record names these weights. Records of earlier versions have a sample of the files."""
        if recorded is None or ":" in recorded:
            return recorded == self
        return len(recorded) == 64 and recorded == sampled_fingerprint(self.folder)


def weights_fingerprint(folder: Path) -> Fingerprint:
    """Every byte of a folder's weights, adapter and shape: the files that are read. Raises OSError for one that cannot
    be, and UserError as `find_weight_files`."""
    found = Fingerprint(_fingerprint([*find_weight_files(folder), *_existing(folder, WEIGHTS)]))
    found.folder = folder
    return found


def tokenizer_fingerprint(folder: Path) -> str:
    """Every byte of what encodes prompts, decodes answers and ends them. End tokens may stand in config.json, too,
    which is in the fingerprint of the weights."""
    return _fingerprint(_existing(folder, TOKENIZER))


def combined(*parts: str | None) -> str:
    """One fingerprint of several, in order."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())}"


@lru_cache(8)
def code_fingerprint(*packages: str) -> str:
    """sha256 over the files of these packages of ptst: what was computed by other code is not taken for today's."""
    digest, root = hashlib.sha256(), Path(ptst.__file__).parent
    for package in packages:
        for path in sorted(p for p in (root / package).rglob("*") if p.suffix in _CODE):
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def sampled_fingerprint(folder: Path) -> str:
    """The fingerprint in records of format 2 before every byte was read: names, sizes, and 4 KiB of every MiB."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(4096):
                digest.update(block)
                file.seek(2**20 - len(block), os.SEEK_CUR)
    return digest.hexdigest()


def _existing(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _fingerprint(files: Sequence[Path]) -> str:
    paths = sorted(set(files))
    digest = xxhash.xxh3_128()
    for path, found in zip(paths, _digests(paths), strict=True):
        digest.update(f"{path.name} {found}\n".encode())
    return f"xxh3:{digest.hexdigest()}"


def _digests(paths: Sequence[Path]) -> list[str]:
    """A digest for each file, from the cache where the file is as it was."""
    known, stamps = _read_cache(), [_stamp(path) for path in paths]
    names = [str(path.resolve()) for path in paths]
    found = {}
    for name, stamp in zip(names, stamps, strict=True):
        if name in known and known[name][:-1] == stamp:
            found[name] = known[name][-1]
    left = {n: (p, s) for n, p, s in zip(names, paths, stamps, strict=True) if n not in found}
    if (size := sum(stamp[0] for _, stamp in left.values())) > _SLOW:
        say(f"reading {size / 1e9:.0f} GB of weights for their fingerprint; it is kept until the files change")
    added = {}
    for name, digest in zip(left, _read([path for path, _ in left.values()]), strict=True):
        path, stamp = left[name]
        found[name] = digest
        settled = time.time() - max(stamp[1], stamp[2]) / 1e9 > _SETTLED
        if stamp[0] >= _KEPT_FROM and settled and _stamp(path) == stamp:
            added[name] = [*stamp, digest]
    if added:
        _write_cache(known | added)
    return [found[name] for name in names]


def _read(paths: Sequence[Path]) -> list[str]:
    """A digest of all bytes of each file, its segments read by several threads."""
    places = [(path, at) for path in paths for at in range(0, max(path.stat().st_size, 1), _SEGMENT)]
    if len(places) > 1:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(places))) as pool:
            segments = list(pool.map(lambda place: _read_segment(*place), places))
    else:
        segments = [_read_segment(*place) for place in places]
    digests = {path: xxhash.xxh3_128() for path in paths}
    for (path, _), segment in zip(places, segments, strict=True):
        digests[path].update(segment)
    return [digests[path].hexdigest() for path in paths]


def _read_segment(path: Path, start: int) -> bytes:
    digest, buffer, left = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER)), _SEGMENT
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size := file.readinto(buffer[: min(left, _BUFFER)]):
            digest.update(buffer[:size])
            left -= size
    return digest.digest()


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_cache() -> dict[str, list[Any]]:
    """Stamp and digest by path; what is no such entry is left out."""
    try:
        values = json.loads((cache_home() / CACHE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = [int, int, int, int, str]
    entries = values.items() if isinstance(values, dict) else ()
    return {k: v for k, v in entries if isinstance(v, list) and [type(x) for x in v] == kinds and len(v[-1]) == 32}


def _write_cache(entries: dict[str, list[Any]]) -> None:
    with suppress(OSError):
        cache_home().mkdir(parents=True, exist_ok=True)
        newest = dict(list(entries.items())[-_MAX_KEPT:])
        write_atomically(cache_home() / CACHE, json.dumps(newest, indent=0).encode())
