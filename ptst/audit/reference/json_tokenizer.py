"""`tokenizer.json` as the oracle reads it (see `reference.tokenizer`).

Control tokens are flagged special in the rules, so that the library leaves them alone in a text. Where a text would
become one all the same (by merges), it is cut through that token, and what follows the cut continues what precedes it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ptst.audit.reference.settings import Flags, Said, broken
from ptst.audit.reference.word_ids import WordIds, encodes_words
from ptst.errors import UserError
from ptst.reading import read_object

SPACE = "\u2581"
# What Llama's folders do to ids: spaces for U+2581, bytes, and one space off the front.
_LLAMA_DECODER = (
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)


class JsonFile:
    """A tokenizer.json with what the files beside it say."""

    def __init__(self, path: Path, said: Said):
        self._path = path
        rules = read_object(path)
        model = rules.get("model") or {}
        vocab = model.get("vocab") or {}
        pieces = frozenset(vocab) if isinstance(vocab, Mapping) else frozenset(entry[0] for entry in vocab)
        in_file = {t["content"]: t for t in rules.get("added_tokens") or () if t["content"]}
        unflagged = {name for name, t in in_file.items() if t.get("special") is False and said.controls(name)}
        for name in unflagged:
            in_file[name]["special"] = True
        _untrimmed(rules.get("post_processor"))
        self._whole = self._load(rules)
        self.control = self._controls(in_file, said)
        self.control = {n: i for n, i in self.control.items() if n not in pieces or not said.is_text(n)}
        self.own = frozenset(name for name in self.control if name in pieces and name not in unflagged)
        implied = {key: name for key, name in said.implied.items() if name in self.control}
        self.bos, self.eos = said.bos or implied.get("bos_token"), said.eos or implied.get("eos_token")
        self.opening: tuple[str, ...] = self._opening()
        self.flags: dict[str, Flags] = {name: _flags_of(t) for name, t in in_file.items()} | dict(said.added)
        # Before the switch is set: as the library reads a marker in a text.
        follows = self._glued_ids()
        self._whole.encode_special_tokens = True
        prefixed = _without_prefix(rules)[1]
        whole = self._run(self._whole, ["a"])[0]
        self.dummy = prefixed and self._run(self._bare, ["a"])[0] != whole
        asked = said.spaced if said.llama else None
        self.spaced = not prefixed or (follows == whole if asked is None else asked)
        self._set_fallback(model)
        self._decoder = rules.get("decoder")
        added = [*self._whole.get_added_tokens_decoder().values()]
        cuts = not self._spelt and encodes_words(rules, added)
        self._words = WordIds(lambda texts: self._run(self._whole, texts)) if cuts and not self.dummy else None

    def _set_fallback(self, model: Mapping[str, Any]) -> None:
        """The tokens that text becomes where the vocabulary lacks it: bytes, or the unknown token."""
        find = self._whole.token_to_id
        named = model.get("unk_token") if model.get("unk_id") is None else self._whole.id_to_token(model["unk_id"])
        unknown = find(named) if named else None
        numbers = [find(f"<0x{b:02X}>") for b in range(256)]
        whole = bool(model.get("byte_fallback")) and None not in numbers
        self._byte = {number: b for b, number in enumerate(numbers)} if whole else {}
        self._fallback = frozenset({*self._byte, *([] if unknown is None else [unknown])})
        self._banned = frozenset(self.control.values()) - {unknown}
        # Text that spells such a token is not one.
        self._spelt = (*([named] if named else []), *(["<0x"] if self._byte else []))

    def _load(self, rules: Mapping[str, Any]) -> Any:
        from tokenizers import Tokenizer

        try:
            made = Tokenizer.from_str(json.dumps(rules))
        except Exception as error:
            raise broken(f"not a tokenizer file ({error})", self._path) from None
        made.no_padding()
        made.no_truncation()
        return made

    def _controls(self, in_file: Mapping[str, Mapping[str, Any]], said: Said) -> dict[str, int]:
        """The control tokens; what the files beside it add as text is added to the library's tokens, too."""
        from tokenizers import AddedToken

        tok = self._whole
        found = {name: tok.token_to_id(name) for name, t in in_file.items() if t.get("special")}
        for name in said.named - in_file.keys():
            number = tok.token_to_id(name)
            if number is not None:
                found[name] = number
        for name, flags in said.added.items():
            if said.controls(name, flags.special):
                found[name] = flags.id
            elif tok.token_to_id(name) is None:
                how = {"lstrip": flags.lstrip, "rstrip": flags.rstrip, "single_word": flags.single_word}
                tok.add_tokens([AddedToken(name, normalized=flags.normalized, **how)])
        return found

    def _opening(self) -> tuple[str, ...]:
        """The control tokens that the file puts before a text."""
        text = self._run(self._whole, ["a"])[0]
        ids = self._whole.encode("a", add_special_tokens=True).ids
        at = next((at for at in range(len(ids)) if ids[at : at + len(text)] == text), 0)
        names = {number: name for name, number in self.control.items()}
        return tuple(names[i] for i in ids[:at] if i in names)

    def _glued_ids(self) -> list[int]:
        """The ids of a letter right after a control token that was added to the vocabulary."""
        added = [name for name in self.control if name not in self.own] or [*self.control]
        return self._run(self._whole, [f"{added[0]}a"])[0][1:] if added else []

    @cached_property
    def _bare(self) -> Any:
        """The tokenizer without the rules that put a space before a text."""
        made = self._load(_without_prefix(json.loads(self._whole.to_str()))[0])
        made.encode_special_tokens = True
        return made

    def _run(self, tok: Any, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._encodings(tok.encode_batch_fast, texts)]

    def _encodings(self, encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
        try:
            return encode([*texts], add_special_tokens=False)
        except BaseException as error:  # a regular expression may panic, which is no Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise broken(f"the tokenizer fails on a text ({error})", self._path) from None
            raise

    def encode(self, texts: Sequence[str], bare: bool) -> list[list[int]]:
        if self._words is not None and not bare:
            found = self._words.encode(texts)
        else:
            found = self._run(self._bare if bare else self._whole, texts)
        for at, ids in enumerate(found):
            if not self._banned.isdisjoint(ids) or (self._spelt and any(s in texts[at] for s in self._spelt)):
                found[at] = [i for i, _, _ in self.spans(texts[at], bare)]
        return found

    def spans(self, text: str, bare: bool) -> list[tuple[int, int, int]]:
        out: list[tuple[int, int, int]] = []
        waiting = [(0, len(text), bare)]
        while waiting:
            start, end, is_bare = waiting.pop()
            part = text[start:end]
            (found,) = self._encodings((self._bare if is_bare else self._whole).encode_batch, [part])
            tokens = [*zip(found.ids, found.offsets, strict=True)]
            cuts = [self._cut(i, part, place) for i, place in tokens if self._is_wrong(i, part, place)]
            if not cuts:
                out += [(i, start + a, start + b) for i, (a, b) in tokens]
                continue
            parts = [*pairwise((0, *cuts, len(part)))]
            waiting += [(start + a, start + b, is_bare or a > 0) for a, b in reversed(parts)]
        return out

    def _is_wrong(self, number: int, text: str, place: tuple[int, int]) -> bool:
        """Whether a text became a control token, or a byte or the unknown token that it spells."""
        spells = number in self._fallback and text[place[0] : place[1]].strip().startswith(self._spelt or ("\0\0",))
        return number in self._banned or spells

    def _cut(self, number: int, text: str, place: tuple[int, int]) -> int:
        if place[1] - place[0] < 2:
            cause = f"a text becomes its control token {self._whole.id_to_token(number)!r}"
            raise UserError(cause, "use another tokenizer", self._path)
        return sum(place) // 2

    def decode(self, ids: Sequence[int]) -> str:
        if isinstance(table := self.bytes_of, _ByteLevel):  # the library takes letters of added tokens for bytes
            return b"".join(map(table.__getitem__, ids)).decode("utf-8", "replace")
        try:
            return self._whole.decode([*ids], skip_special_tokens=False)
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise broken(f"the tokenizer fails on ids ({error})", self._path) from None
            raise

    @cached_property
    def bytes_of(self) -> "Mapping[int, bytes] | None":
        decoder = self._decoder or {}
        parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
        if [part.get("type") for part in parts or ()] == ["ByteLevel"]:
            added = {n: t.content for n, t in self._whole.get_added_tokens_decoder().items()}
            return _ByteLevel(self._whole, added)
        return _Spaces(self._whole, self._byte) if tuple(parts or ()) == _LLAMA_DECODER and self.dummy else None

    def vocabulary(self) -> dict[str, int]:
        return {**self._whole.get_vocab(), **self.control}


class _Table(dict[int, bytes]):
    """Bytes by token, found out when first asked for. An id without a token has none."""

    def __init__(self, tok: Any, more: Mapping[int, Any]):
        super().__init__()
        self._tok, self._more = tok, more


class _ByteLevel(_Table):
    """The tokens of byte-level BPE, which spell each byte as a letter; added ones are text."""

    def __missing__(self, number: int) -> bytes:
        name = self._more.get(number) or self._tok.id_to_token(number) or ""
        found = name.encode() if number in self._more else bytes(_LETTERS.get(c, 0) for c in name)
        self[number] = found
        return found


class _Spaces(_Table):
    """The tokens of sentencepiece's models: U+2581 is a space, `<0x0A>` a byte."""

    def __missing__(self, number: int) -> bytes:
        if number in self._more:
            found = bytes([self._more[number]])
        else:
            found = (self._tok.id_to_token(number) or "").replace(SPACE, " ").encode()
        self[number] = found
        return found


def _letters() -> Iterator[tuple[str, int]]:
    """GPT-2's letter for each byte: itself where it prints, else the next of U+0100 and up."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in prints]
    yield from ((chr(b), b) for b in prints)
    yield from ((chr(0x100 + n), b) for n, b in enumerate(others))


_LETTERS = dict(_letters())


def _flags_of(token: Mapping[str, Any]) -> Flags:
    return Flags(token["id"], True, bool(token.get("lstrip")), bool(token.get("rstrip")))


def _untrimmed(rule: Any) -> None:
    """Let the places of tokens include their leading space."""
    if isinstance(rule, dict):
        if "trim_offsets" in rule:
            rule["trim_offsets"] = False
        for inner in rule.get("processors") or ():
            _untrimmed(inner)


def _without_prefix(rules: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The rules without those that put a space before a text, and whether there were any."""
    count = 0

    def visit(rule: Any) -> Any:
        nonlocal count
        if isinstance(rule, list):
            return [new for inner in rule if (new := visit(inner)) is not None]
        if not isinstance(rule, dict):
            return rule
        if rule.get("type") == "Prepend":
            count += 1
            return None
        new = {key: visit(value) if key in ("normalizers", "pretokenizers") else value for key, value in rule.items()}
        if new.get("add_prefix_space"):
            count, new["add_prefix_space"] = count + 1, False
        if new.get("prepend_scheme", "never") != "never":
            count, new["prepend_scheme"] = count + 1, "never"
        return new

    parts = {key: visit(rules.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return {**rules, **parts}, count > 0
