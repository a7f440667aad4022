"""The oracle's own tokenizer: it reads the files of a folder by itself.

The audit compares what the text layer made of a row with what this tokenizer makes of it, so nothing here is imported
from there: a fault in the text layer's tokenizer is a difference then. `tokenizer.json` is read by the library
`tokenizers`, `tokenizer.model` by `sentencepiece`, the small files beside them by `reference.settings`. Only the place
of the files is taken from the tokenizer under test (its `origin`).

A text is read either as a whole text, with sentencepiece's dummy space before it, or `bare`, as one that continues
others. Texts come in lists, and the library gets all in one call.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from ptst.audit.reference.json_tokenizer import JsonFile
from ptst.audit.reference.sentencepiece_tokenizer import PiecesFile
from ptst.audit.reference.settings import Said, ends_in, said_by, said_by_folder
from ptst.errors import UserError

Text = tuple[str, bool]  # a text, and whether it is bare
Span = tuple[int, int, int]  # an id, and where in the text its token begins and ends
PROBES = ("The sum of 12 apples", "don't\n\n  two\t", "Na\u00efve \u65e5\u672c\u8a9e \U0001f600", "x**2 = f(x):")
SHORT = 64  # characters of a text that is worth remembering: words of templates and formats recur in every row


# A tokenizer file that was read. `control`: ids of control tokens by name; `own`: those of the model itself; `dummy`:
# whether a dummy space is put before a text, `spaced`: also after tokens that are not the model's own; `flags`: of
# added tokens; `bytes_of`: the bytes of each token, None for a decoder that is not known.
File = JsonFile | PiecesFile


@dataclass(frozen=True, eq=False)
class ReferenceTokenizer:
    """A tokenizer of the audit's own. `control`: ids of control tokens by name. `ends`: ids that end an answer by the
    folder's files. `lstrip`, `rstrip`: control tokens that swallow the whitespace before and after them. `rows`: the
    embedding rows that ids must not exceed."""

    file: File
    control: dict[str, int]
    ends: frozenset[int]
    lstrip: frozenset[str] = frozenset()
    rstrip: frozenset[str] = frozenset()
    like_transformers: bool = False
    rows: int | None = None

    @cached_property
    def names(self) -> dict[int, str]:
        return {number: name for name, number in self.control.items()}

    @cached_property
    def _remembered(self) -> dict[Text, list[int]]:
        return {}

    @property
    def bos(self) -> str | None:
        return self.file.bos

    @property
    def eos(self) -> str | None:
        return self.file.eos

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens that have an embedding row, by name."""
        return {name: i for name, i in self.file.vocabulary().items() if self.rows is None or i < self.rows}

    def id_of(self, name: str) -> int:
        """Id of a control token. Raises UserError where there is none of that name."""
        if name not in self.control:
            raise UserError(f"the tokenizer's files have no control token {name!r}", "choose another chat format")
        return self.control[name]

    def is_bare(self, after: str | None, continues: bool = False) -> bool:
        """Whether a text has no dummy space: it continues other text, or follows a control token that takes none."""
        glued = after is not None and not self.file.spaced and (self.like_transformers or after not in self.file.own)
        return self.file.dummy and (continues or glued)

    def encode(self, texts: Iterable[Text]) -> dict[Text, list[int] | UserError]:
        """Ids of each distinct text; of one that cannot be encoded, the reason."""
        known = self._remembered
        found: dict[Text, list[int] | UserError] = {}
        for text in texts:
            if text not in found:
                found[text] = known.get(text, [])
        for bare in (False, True):
            new = [text for text in found if text[1] is bare and text not in known and text[0]]
            for text, ids in zip(new, self._all([text for text, _ in new], bare), strict=True):
                found[text] = ids
                if len(text[0]) <= SHORT and len(known) < 4096 and isinstance(ids, list):
                    known[text] = ids
        return found

    def _all(self, texts: list[str], bare: bool) -> list[list[int] | UserError]:
        try:
            "".join(texts).encode()
            return [*self.file.encode(texts, bare)]
        except (UserError, UnicodeEncodeError) as error:
            if len(texts) > 1:  # one by one, to find the ones that it cannot read
                return [self._all([text], bare)[0] for text in texts]
            if isinstance(error, UserError):
                return [error]
            surrogate = f"U+{ord(texts[0][error.start]):04X} at character {error.start} of a text"
            return [UserError(f"a lone surrogate, {surrogate}, is not valid Unicode", "remove it")]

    def spans(self, text: str, bare: bool) -> list[Span]:
        """Ids of a text with their places. A character of several tokens is at the place of each."""
        return self.file.spans(text, bare) if text else []

    def restores(self, text: Text, ids: Sequence[int]) -> bool:
        """Whether the ids of one run of text decode to it."""
        table, (words, bare) = self.file.bytes_of, text
        if table is not None and b"".join(map(table.__getitem__, ids)) == self._lead(bare) + words.encode():
            return True
        return self.decode_run(ids, bare) == words

    def _lead(self, bare: bool) -> bytes:
        return b" " if self.file.dummy and not bare else b""

    def decode_run(self, ids: Sequence[int], bare: bool = False) -> str:
        """Text of the ids of one run of text, without its dummy space."""
        if not bare:
            return self.file.decode(ids)
        return self.file.decode([*self.file.encode(["a"], False)[0], *ids])[1:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens by name."""
        runs = ((self.decode_run(run, bare) if name is None else name) for name, run, bare in self._runs(ids))
        return "".join(runs)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each of any ids: a character of several tokens is the first one's; control tokens by name."""
        out: list[str] = []
        for name, run, bare in self._runs(ids):
            out += [name] if name is not None else self._texts(run, bare)
        return out

    def _runs(self, ids: Sequence[int]) -> Iterator[tuple[str | None, list[int], bool]]:
        """Control tokens by name, and between them the ids of text and whether these are bare."""
        after: str | None = None
        for name, run in groupby(ids, self.names.get):
            if name is None:
                yield None, list(run), self.is_bare(after)
                continue
            for number in run:
                yield name, [number], False
            after = name

    def _texts(self, ids: list[int], bare: bool) -> list[str]:
        table = self.file.bytes_of
        if table is None:
            ends = [len(self.decode_run(ids[:at], bare).rstrip("\ufffd")) for at in range(len(ids))]
            whole = self.decode_run(ids, bare)
            return [whole[a:b] for a, b in pairwise([*accumulate(ends, max), len(whole)])]
        parts = [table[i] for i in ids]
        whole = b"".join(parts).decode("utf-8", "surrogateescape")
        widths = (1 if "\udc80" <= c <= "\udcff" else len(c.encode()) for c in whole)
        starts, out = [*accumulate(map(len, parts), initial=0)], [""] * len(ids)
        for at, c in zip(accumulate(widths, initial=0), whole, strict=False):
            out[bisect_right(starts, at) - 1] += "\ufffd" if "\udc80" <= c <= "\udcff" else c
        if self._lead(bare) and ids and out[0].startswith(" "):
            out[0] = out[0][1:]
        return out


def open_reference_tokenizer(origin: Any, like_transformers: bool = False) -> ReferenceTokenizer:
    """The tokenizer of an `origin` (path, settings, folder, rows), read from its files. Files that were read before and
    have not changed are not read again. Raises UserError for files that cannot be read."""
    files = sorted(p for p in (origin.folder or origin.path.parent).iterdir() if p.suffix in (".json", ".model"))
    stamp = tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)
    found = _open(_Key(origin, (repr(origin), stamp)))
    return replace(found, like_transformers=True) if like_transformers else found


class _Key:
    """An origin, equal to others of the same settings and files."""

    def __init__(self, origin: Any, value: object):
        self.origin, self.value = origin, value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.value == other.value


@lru_cache(32)
def _open(key: _Key) -> ReferenceTokenizer:
    origin = key.origin
    if origin.folder is None:
        said = said_by(origin.settings)
        kind = JsonFile if origin.path.suffix == ".json" else PiecesFile
        return _made(kind(origin.path, said), frozenset(), None)
    folder = Path(origin.folder)
    said, ends = said_by_folder(folder), ends_in(folder)
    file = _chosen(folder, said)
    if file.eos is None:  # the model's own files may be the only ones to name it
        names = {number: name for name, number in file.vocabulary().items()}
        end = next((names[i] for i in ends if i in names), None)
        if end is not None:
            said = replace(said, roles={**said.roles, "eos_token": end}, named=said.named | {end})
            file = _chosen(folder, said)
    return _made(file, frozenset(ends), origin.rows)


def _made(file: File, ends: frozenset[int], rows: int | None) -> ReferenceTokenizer:
    control = {name: number for name, number in file.control.items() if rows is None or number < rows}
    own = {control[file.eos]} if file.eos in control else set()
    lstrip, rstrip = (
        frozenset(name for name, flags in file.flags.items() if getattr(flags, side) and name in control)
        for side in ("lstrip", "rstrip")
    )
    return ReferenceTokenizer(file, control, ends | own, lstrip, rstrip, rows=rows)


def _chosen(folder: Path, said: Said) -> File:
    """tokenizer.model, unless tokenizer.json beside it says more or otherwise, or is the only one."""
    rules = JsonFile(folder / "tokenizer.json", said) if (folder / "tokenizer.json").exists() else None
    if rules is None or not (folder / "tokenizer.model").exists():
        return rules or PiecesFile(folder / "tokenizer.model", said)
    try:
        pieces = PiecesFile(folder / "tokenizer.model", said)
    except UserError:
        return rules
    mine, theirs = pieces.vocabulary(), rules.vocabulary()
    more = (theirs.keys() - mine.keys()) | (rules.control.keys() - pieces.control.keys())
    if not mine.items() <= theirs.items() or more - said.unused - {"<unk>"}:
        return rules
    if pieces.encode(PROBES, False) != rules.encode(PROBES, False):
        return rules
    pieces.spaced, pieces.opening = rules.spaced, rules.opening
    return pieces
