"""What both kinds of tokenizers share: text to ids and back, with control tokens looked up by name alone."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from ptst.errors import Setting, UserError
from ptst.text.added_tokens import AddedToken, TokenSettings

Run = tuple[str, bool]  # a run of text, and whether it is bare: without the dummy space
SHORT = 64  # characters of a run that is worth remembering
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Origin:
    """What a tokenizer was read from, so that the audit can read the same by itself: the file at `path`, with settings
    as they were given; or the files of a model `folder`, which has `rows` embedding rows (None: not said)."""

    path: Path
    settings: TokenSettings | dict[str, Any] | None = None
    folder: Path | None = None
    rows: int | None = None


class Tokenizer(ABC):
    """Text to ids and back. Subclasses set the attributes.

    sentencepiece puts a dummy space before every text. After a control token, that is the rule for those of the model
    itself (`own`); after one that was added later, for folders whose tokenizer does so (`spaced`)."""

    origin: Origin
    vocab_size: int
    bos: str | None  # names of control tokens
    eos: str | None
    opening: tuple[str, ...]  # control tokens that the model expects before plain text: BOS, mostly
    implied: Mapping[str, str]  # control tokens by their roles, as transformers knows them where no file names them
    own: frozenset[str] = frozenset()
    spaced: bool = True
    lstrip: frozenset[str] = frozenset()  # control tokens that swallow the whitespace before them
    rstrip: frozenset[str] = frozenset()  # after them
    _control: dict[str, int]
    _ids: Callable[[str], list[int]]
    """Ids of a text, with its dummy space where there is one."""
    _continued: Callable[[str], list[int]]
    """Ids of a text without the dummy space."""
    _decode: Callable[[list[int]], str]
    """Text of the ids of one run of text, without its dummy space."""

    def encode(self, text: str, *, continuation: bool = False, after: str | None = None) -> list[int]:
        """Ids of a run of text; none of them is a control token's. `continuation`: the text continues other text, so no
        dummy space precedes it; `after`: the control token before it. Raises UserError for text that is not Unicode
        (lone surrogates)."""
        run = text, self.is_bare(after, continuation)
        ids = self.encode_all((run,))[run]
        if isinstance(ids, UserError):
            raise ids
        return [*ids]

    def is_bare(self, after: str | None, continuation: bool = False) -> bool:
        """Whether a run of text has no dummy space where the tokenizer puts one: a continuation, and after some control
        tokens."""
        return self._dummy_space and (continuation or self._glued(after))

    def encode_all(self, runs: Iterable[Run]) -> dict[Run, list[int] | UserError]:
        """Ids of many runs of text (text, is bare), each distinct one encoded once, all in one call of the library; of
        text that cannot be encoded, the reason. The ids are not the caller's to change."""
        known = self._known  # templates and role names recur in every row
        found: dict[Run, list[int] | UserError] = {}
        new: dict[bool, list[str]] = {False: [], True: []}
        for run in runs:
            if run not in found:
                found[run] = known.get(run, [])
                if not found[run] and run[0]:
                    new[run[1]].append(run[0])
        for bare, texts in new.items():
            if not texts:
                continue
            for text, ids in zip(texts, self._encode_all(texts, bare), strict=True):
                found[text, bare] = ids
                if len(text) < SHORT and not isinstance(ids, UserError):
                    known[text, bare] = ids
        if len(known) > 4096:
            known.clear()
        return found

    def _encode_all(self, texts: list[str], bare: bool) -> Sequence[list[int] | UserError]:
        try:
            for text in texts:
                text.encode("utf-8")
            return self._continued_all(texts) if bare else self._ids_all(texts)
        except UnicodeEncodeError as error:
            surrogate = f"a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}"
            failed = UserError(f"the text holds {surrogate}, which is not valid Unicode", "remove it")
        except UserError as error:
            failed = error
        if len(texts) == 1:
            return [failed]
        return [self._encode_all([text], bare)[0] for text in texts]  # to find those that cannot be encoded

    def _ids_all(self, texts: list[str]) -> list[list[int]]:
        return [self._ids(text) for text in texts]

    def _continued_all(self, texts: list[str]) -> list[list[int]]:
        return [self._continued(text) for text in texts]

    @cached_property
    def _known(self) -> dict[Run, list[int]]:
        return {}

    @property
    @abstractmethod
    def _dummy_space(self) -> bool:
        """Whether a space is put before every text."""

    def _glued(self, after: str | None) -> bool:
        """Whether text after this control token has no dummy space."""
        return after is not None and not self.spaced and after not in self.own

    def decode_text(self, ids: list[int], after: str | None = None) -> str:
        """Text of the ids of one run of text, without its dummy space; `after`: the control token before it. What is no
        id (-100, in the batch of another trainer) has no text, as an id without a token."""
        return self.decode_all([([i for i in ids if i >= 0], self.is_bare(after))])[0]

    def lossy(self, encoded: Mapping[Run, list[int]]) -> dict[Run, str]:
        """What runs of text decode to, of those that their ids do not give back."""
        unsure = {run: ids for run, ids in encoded.items() if not self._gives_back(run, ids)}
        decoded = self.decode_all([(ids, run[1]) for run, ids in unsure.items()])
        return {run: text for run, text in zip(unsure, decoded, strict=True) if text != run[0]}

    def _gives_back(self, run: Run, ids: list[int]) -> bool:
        """Whether the ids of a run certainly decode to it; False where decoding must tell."""
        return False

    def decode_all(self, runs: Sequence[tuple[list[int], bool]]) -> list[str]:
        """Texts of the ids of many runs of text (ids, is bare), without dummy spaces."""
        before = self._ids("a") if any(bare for _, bare in runs) else []
        texts = self._decode_all([[*before, *ids] if bare else ids for ids, bare in runs])
        return [text[1:] if bare else text for text, (_, bare) in zip(texts, runs, strict=True)]

    def _decode_all(self, runs: list[list[int]]) -> list[str]:
        return [self._decode(ids) for ids in runs]

    def decode(self, ids: list[int], after: str | None = None) -> str:
        """Text of ids, control tokens by name; the dummy space of each run of text is dropped."""
        out: list[str] = []
        for name, run in groupby(ids, self.control_names.get):
            run_ids = list(run)
            out.append(self.decode_text(run_ids, after) if name is None else name * len(run_ids))
            after = name
        return "".join(out)

    def decode_answer(self, prompt_ids: list[int], answer_ids: list[int]) -> str:
        """Text of an answer in context: decoding of all minus decoding of the prompt (its last run of text)."""
        start = max((i + 1 for i, t in enumerate(prompt_ids) if t in self.control_names), default=0)
        after = self.control_names[prompt_ids[start - 1]] if start else None
        tail = prompt_ids[start:]
        return self.decode(tail + answer_ids, after)[len(self.decode(tail, after)) :]

    def token_bytes(self, number: int) -> bytes:
        """The bytes of text that one token stands for, maybe a part of a character; a control token's are its name, and
        an id without a token has none."""
        if (name := self.control_names.get(number)) is not None:
            return name.encode()
        return self._piece_bytes(number)

    def _piece_bytes(self, number: int) -> bytes:
        piece = self._piece(number) or ""
        if found := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("\u2581", " ").encode()

    @abstractmethod
    def _piece(self, number: int) -> str | None:
        """The name of a token that is text, as the vocabulary spells it; None for an id without one."""

    def control_id(self, name: str) -> int:
        """Id of a control token. Raises UserError when this tokenizer has none of that name."""
        if name not in self._control:
            remedy = ("choose the ", Setting("chat_format"), " that fits the model")
            raise UserError(f"this tokenizer has no control token {name!r}", remedy)
        return self._control[name]

    def has_control(self, name: str) -> bool:
        """Whether this tokenizer has a control token of that name, whatever its file's flags say."""
        return name in self._control

    @property
    @abstractmethod
    def tokens(self) -> dict[str, int]:
        """The id of every token by its name, control tokens included."""

    def encode_markers(self, text: str) -> list[int] | None:
        """Ids of a text whose names of control tokens are control tokens, for comparison with other programs: never of
        a message. None where the library has no such reading (sentencepiece)."""
        return None

    @cached_property
    def control_names(self) -> dict[int, str]:
        return {i: name for name, i in self._control.items()}

    def limited(self, rows: int) -> Self:
        """The same tokenizer without the control tokens for which an embedding of so many rows has none."""
        new = copy(self)
        new._control = {name: i for name, i in self._control.items() if i < rows}
        new.__dict__.pop("control_names", None)
        return new

    def like_transformers(self) -> Self:
        """The same tokenizer with the dummy space after control tokens where `transformers` puts it when it reads a
        rendered chat template. The formats' owners put it after all of their own."""
        new = copy(self)
        new.own = frozenset()
        return new

    def _take_flags(self, tokens: Iterable[AddedToken]) -> None:
        control = {t.name: t for t in tokens if t.name in self._control}.values()
        self.lstrip = frozenset(t.name for t in control if t.lstrip)
        self.rstrip = frozenset(t.name for t in control if t.rstrip)
