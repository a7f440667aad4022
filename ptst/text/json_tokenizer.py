"""`tokenizer.json`, read by the library `tokenizers`: Llama 3, Qwen, SmolLM2 and most of today's folders.

The library can leave special tokens in a text alone, but not the other added tokens, among which are the role markers
of many fine-tunes. The file is therefore loaded with every marker flagged special. A control token that a text would
reach by merges, or as a piece of the vocabulary, is taken apart again.
"""

import json
import math
from collections.abc import Iterator, Set
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.progress import say_once
from ptst.reading import parse_json, read_text
from ptst.text.added_tokens import AddedToken, TokenSettings
from ptst.text.base_tokenizer import Origin, Run, Tokenizer
from ptst.text.byte_level import TokenBytes
from ptst.text.time_limit import within
from ptst.text.word_cache import WordCache, cuts_before_spaces, takes_whitespace

MAX_GROWTH = 64  # times the length of a text, by the rules of a tokenizer.json
AT_ONCE = 32  # texts that the library gets in one call: with more, its memory costs time
SECONDS = 30  # that an unknown regular expression may take over one text
# Regular expressions of published folders, which take no longer than reading does: Llama 3, Qwen 2 and 3.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = (f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}", f"{_CONTRACTIONS}\\p{{N}}{_REST}")
_AGAIN = "fetch the file again"
_REPLACEMENT = "\ufffd"


class JsonTokenizer(Tokenizer):
    """`tokenizer.json` with what the settings add to it. Raises UserError for a damaged file, and for settings that
    contradict it."""

    def __init__(self, path: Path, settings: TokenSettings | dict | None = None):
        self.path, self.origin = path, Origin(path, settings)
        settings = settings if isinstance(settings, TokenSettings) else TokenSettings.of(settings or {})
        text, rules = read_rules(path)
        flagged = flag_markers(rules, settings)
        self._tok = self._load(json.dumps(rules) if flagged else text)
        try:
            opened = self._tok.encode("a", add_special_tokens=True)
        except BaseException as error:
            raise self._explain(error, "not a tokenizer file") from None
        model = rules["model"]
        self._note_moved(rules)
        self._take_tokens(settings)
        inside = self._control.keys() & _vocabulary(model)
        self._control = {n: i for n, i in self._control.items() if not (n in inside and settings.borrows(n))}
        self.own = frozenset(self._control.keys() & inside - flagged)
        self.vocab_size = max(self._tok.get_vocab_size(), *(token.id + 1 for token in settings.added), 0)
        self.implied = {key: name for key, name in settings.implied.items() if name in self._control}
        self.bos = settings.bos or self.implied.get("bos_token")
        self.eos = settings.eos or self.implied.get("eos_token")
        self.opening = self._find_opening(opened, settings)
        self._prefixed = _remove_prefix(rules)
        said = settings.spaced if settings.is_llama else None
        self.spaced = not self._prefixed or (self._is_spaced() if said is None else said)
        self._bytes = {i: b for b in range(256) if (i := self._tok.token_to_id(f"<0x{b:02X}>")) is not None}
        if not (model.get("byte_fallback") and len(self._bytes) == 256):
            self._bytes = {}
        unknown = model.get("unk_token") if model.get("unk_id") is None else self._tok.id_to_token(model["unk_id"])
        self._unknown = self._tok.token_to_id(unknown) if unknown else None
        self._kept_out = frozenset(self._control.values()) - {self._unknown}
        # Tokens that text may become, but not by spelling them.
        self._spelt = (*([unknown] if unknown else ()), *(["<0x"] if self._bytes else ()))
        patterns = [*_patterns(rules.get("normalizer")), *_patterns(rules.get("pre_tokenizer"))]
        self._limit = None if all(pattern in KNOWN for pattern in patterns) else SECONDS
        self._literal = {} if self._prefixed else self._find_literal()
        self._words = self._word_cache(rules)
        self._tok.encode_special_tokens = True

    def _load(self, text: str):
        import tokenizers

        try:
            tok = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            raise self._explain(error, "not a tokenizer file") from None
        tok.no_padding()
        tok.no_truncation()
        return tok

    def _note_moved(self, rules: dict[str, Any]) -> None:
        """Say where the library, and so `transformers`, gives an added token another id than the file does: it counts
        on from the vocabulary's last."""
        for entry in rules.get("added_tokens") or ():
            name, number = entry["content"], entry["id"]
            if name and (used := self._tok.token_to_id(name)) != number:
                say_once(
                    f"note: {self.path}: {name!r} has the id {number} there and is read as {used}, as in transformers"
                )

    def _take_tokens(self, settings: TokenSettings) -> None:
        """Find the control tokens, and add what the settings have besides."""
        import tokenizers

        in_file = [
            AddedToken(t.content, i, t.special, t.lstrip, t.rstrip)
            for i, t in self._tok.get_added_tokens_decoder().items()
        ]
        self._control = {t.name: t.id for t in in_file if t.special}
        named = {name: i for name in settings.special if (i := self._tok.token_to_id(name)) is not None}
        self._control |= {name: i for name, i in named.items() if name not in {t.name for t in in_file}}
        own = {t.id: t.name for t in in_file}  # which the library calls by their names as its rules rewrite them
        for token in settings.added:
            found, other = self._tok.token_to_id(token.name), own.get(token.id, self._tok.id_to_token(token.id))
            if found is None and other is None and not settings.is_control(token.name, token.special):
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                self._tok.add_tokens([tokenizers.AddedToken(token.name, normalized=token.normalized, **flags)])
                found, other = self._tok.token_to_id(token.name), self._tok.id_to_token(token.id)
            if found not in (None, token.id) or other not in (None, token.name):
                cause = f"the files beside it give {token.name!r} the id {token.id}"
                here = f"here {token.name!r} is {found}" if found is not None else f"here that is {other!r}"
                raise UserError(f"{cause}, {here}", "fetch the tokenizer's files again", self.path)
            if settings.is_control(token.name, token.special):
                self._control[token.name] = token.id
        self._take_flags((*in_file, *settings.added))

    def _find_opening(self, opened: Any, settings: TokenSettings) -> tuple[str, ...]:
        """The control tokens that the file's rules put before a text. They count, as in transformers, and that is said
        where the settings want it otherwise."""
        pairs = zip(opened.ids, opened.special_tokens_mask, strict=True)
        names = tuple(
            self.control_names[i] for i, _ in takewhile(lambda pair: pair[1], pairs) if i in self.control_names
        )
        if settings.adds_bos is not None and settings.adds_bos is not (self.bos in names):
            does = f"puts {' '.join(names)} before texts" if names else "puts no token before texts"
            says = str(settings.adds_bos).lower()
            say_once(f"note: {self.path} {does}, which counts; add_bos_token = {says} does not, as in transformers")
        return names

    @property
    def tokens(self) -> dict[str, int]:
        return self._tok.get_vocab() | self._control

    def _piece(self, number: int) -> str | None:
        return self._tok.id_to_token(number)

    def _piece_bytes(self, number: int) -> bytes:
        table = self._token_bytes
        return super()._piece_bytes(number) if table is None else table[number]

    def encode_markers(self, text: str) -> list[int]:
        self._tok.encode_special_tokens = False
        try:
            return self._tok.encode(text, add_special_tokens=False).ids
        finally:
            self._tok.encode_special_tokens = True

    def _word_cache(self, rules: dict[str, Any]) -> WordCache | None:
        """Ids of words, where these rules encode words by themselves."""
        added = self._tok.get_added_tokens_decoder().values()
        apart = self._limit is None and not (self._bytes or self._prefixed) and cuts_before_spaces(rules, KNOWN)
        if not apart or any(map(takes_whitespace, added)) or any(map(str.isspace, "".join(self._spelt))):
            return None
        return WordCache(self._in_batches)

    def _is_spaced(self) -> bool:
        """Whether the library puts a dummy space after a control token that was added to the vocabulary."""
        name = min(self._control, key=lambda name: name in self.own)
        ids = self._tok.encode(f"{name}a", add_special_tokens=False).ids
        return ids[1:] == self._tok.encode("a", add_special_tokens=False).ids

    def _find_literal(self) -> dict[int, str]:
        """Added tokens that are text and do not decode to it: a byte-level decoder takes letters for bytes."""
        added = {i: token.content for i, token in self._tok.get_added_tokens_decoder().items()}
        text = {i: name for i, name in added.items() if name not in self._control}
        return {i: name for i, name in text.items() if self._tok.decode([i], skip_special_tokens=False) != name}

    def _ids(self, text: str) -> list[int]:
        return self._encode_with(self._tok, text)

    def _continued(self, text: str) -> list[int]:
        return self._encode_with(self._bare, text)

    @cached_property
    def _bare(self):
        """The tokenizer without the rules that put a space before a text."""
        rules = json.loads(self._tok.to_str())
        _remove_prefix(rules)
        bare = self._load(json.dumps(rules))
        bare.encode_special_tokens = True
        return bare

    @cached_property
    def _dummy_space(self) -> bool:
        return self._prefixed and self._ids("a") != self._continued("a")

    def _ids_all(self, texts: list[str]) -> list[list[int]]:
        return self._encode_all_with(self._tok, texts)

    def _continued_all(self, texts: list[str]) -> list[list[int]]:
        return self._encode_all_with(self._bare, texts)

    def _encode_all_with(self, tok, texts: list[str]) -> list[list[int]]:
        if self._limit is not None or len(texts) == 1:
            return [self._encode_with(tok, text) for text in texts]
        try:
            if self._words is None or tok is not self._tok:
                found = self._in_batches(texts, tok)
            else:
                known = self._words.encode_all(texts)
                rest = iter(self._in_batches([text for text, ids in zip(texts, known, strict=True) if ids is None]))
                found = [next(rest) if ids is None else ids for ids in known]
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on a text") from None
        for at, ids in enumerate(found):
            if not self._is_plain(texts[at], ids):
                found[at] = self._encode_with(tok, texts[at])
        return found

    def _in_batches(self, texts: list[str], tok=None) -> list[list[int]]:
        tok = self._tok if tok is None else tok
        parts = (texts[at : at + AT_ONCE] for at in range(0, len(texts), AT_ONCE))
        return [e.ids for part in parts for e in tok.encode_batch_fast(part, add_special_tokens=False)]

    def _is_plain(self, text: str, ids: list[int]) -> bool:
        """Whether no id is a control token's, and none may be that of a spelt one."""
        return self._kept_out.isdisjoint(ids) and not (self._spelt and self._is_spelt(text))

    def _is_spelt(self, text: str) -> bool:
        return any(name in text for name in self._spelt)

    def _encode_with(self, tok, text: str) -> list[int]:
        # The fast form returns ids without their offsets in the text.
        try:
            ids = within(self._limit, lambda: tok.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            if self._is_plain(text, ids):
                return ids
            found = tok.encode(text, add_special_tokens=False)
        except TimeoutError:
            cause = f"its regular expressions take more than {self._limit} s over a text of {len(text)} characters"
            raise UserError(cause, "leave the text out, or use the model's own tokenizer.json", self.path) from None
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on a text") from None
        cuts = []
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            fallback = i in self._bytes or i == self._unknown
            if i in self._kept_out or (fallback and text[start:end].strip().startswith(self._spelt)):
                if end - start < 2:
                    cause = f"a text becomes its control token {self._tok.id_to_token(i)!r}"
                    raise UserError(cause, "use another tokenizer", self.path)
                cuts.append((start + end) // 2)
        if not cuts:
            return ids
        first, *rest = (text[start:end] for start, end in pairwise((0, *cuts, len(text))))
        return [*self._encode_with(tok, first), *(i for part in rest for i in self._continued(part))]

    def _decode(self, ids: list[int]) -> str:
        try:
            if not self._literal.keys().isdisjoint(ids):
                runs = groupby(ids, self._literal.get)
                return "".join(self._decode([*run]) if name is None else name * len([*run]) for name, run in runs)
            text = self._tok.decode(ids, skip_special_tokens=False) if ids else ""
            if self._bytes and _REPLACEMENT in text:  # one wrong byte would spoil all bytes around it
                text = self._tok.decode([*self._with_whole_characters(ids)], skip_special_tokens=False)
            return text
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on ids") from None

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        """The bytes of tokens, where decoding joins them and does no more."""
        decoder = json.loads(self._tok.decoder.__getstate__()) if self._tok.decoder else {}
        is_byte_level = decoder.get("type") == "ByteLevel" and not self._prefixed
        return TokenBytes(self._tok.id_to_token, self._literal) if is_byte_level else None

    def _gives_back(self, run: Run, ids: list[int]) -> bool:
        table = self._token_bytes
        return table is not None and b"".join(map(table.__getitem__, ids)) == run[0].encode()

    def _decode_all(self, runs: list[list[int]]) -> list[str]:
        if len(runs) == 1:
            return [self._decode(runs[0])]
        try:
            texts = self._tok.decode_batch(runs, skip_special_tokens=False)
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on ids") from None
        for at, ids in enumerate(runs):
            if (self._bytes and _REPLACEMENT in texts[at]) or not self._literal.keys().isdisjoint(ids) or not ids:
                texts[at] = self._decode(ids)
        return texts

    def _with_whole_characters(self, ids: list[int]) -> Iterator[int]:
        """The ids with every byte that belongs to no character replaced by those of U+FFFD, as sentencepiece reads
        them."""
        ids_of = {b: i for i, b in self._bytes.items()}
        for is_byte, run in groupby(ids, self._bytes.__contains__):
            if not is_byte:
                yield from run
                continue
            found = bytes(self._bytes[i] for i in run).decode("utf-8", "surrogateescape")
            whole = (_REPLACEMENT if "\udc80" <= c <= "\udcff" else c for c in found)
            yield from (ids_of[b] for b in "".join(whole).encode())

    def _explain(self, error: BaseException, cause: str) -> BaseException:
        """The UserError for an error of the library: it raises bare Exception for every kind of damage, and a panic of
        Rust (by a regular expression that backtracks for ever, say), which is no Exception."""
        if isinstance(error, UserError) or (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):
            return error  # Ctrl-C
        return UserError(f"{cause} ({error})", _AGAIN, self.path)


def _patterns(rule: Any) -> Iterator[str]:
    """Every regular expression in a part of a tokenizer.json."""
    if isinstance(rule, dict):
        if isinstance(pattern := rule.get("Regex"), str):
            yield pattern
        rule = list(rule.values())
    for inner in rule if isinstance(rule, list) else ():
        yield from _patterns(inner)


def read_rules(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a tokenizer.json. Raises UserError for what is none, for replacements that make texts more
    than 64 times as long (three rules can fill any memory), and for merges that are left out at random."""
    try:
        text = read_text(path)
        rules = parse_json(text)
        parts = [rules.get("normalizer"), rules.get("decoder")] if isinstance(rules, dict) else []
        factor = max(map(_growth, parts), default=1.0)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a tokenizer file ({error})", _AGAIN, path) from None
    if not isinstance(rules, dict) or not isinstance(rules.get("model"), dict):
        raise UserError("not a tokenizer file (it has no model)", _AGAIN, path)
    if factor > MAX_GROWTH:
        raise UserError("its replacements make texts more than 64 times as long", _AGAIN, path)
    if rules["model"].get("dropout"):
        raise UserError("its dropout leaves out merges at random", "set it to null", path)
    return text, rules


def _growth(rule: object) -> float:
    """How many times longer a rule of a tokenizer.json can make a text; 1 for what the library will refuse."""
    if not isinstance(rule, dict):
        return 1.0
    factor = 1.0
    for inner in (rules for key in ("normalizers", "decoders") if isinstance(rules := rule.get(key), list)):
        factor *= math.prod(map(_growth, inner))
    if isinstance(content := rule.get("content"), str):
        pattern = rule.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match between characters.
        factor *= max(1.0, len(content) / len(found)) if isinstance(found, str) and found else 1.0 + len(content)
    if isinstance(prefix := rule.get("prepend"), str):
        factor *= 1.0 + len(prefix)
    return min(factor, 1e300)


def flag_markers(rules: dict[str, Any], settings: TokenSettings) -> frozenset[str]:
    """Flag the added tokens that are control tokens as special; returns the names of those that were not."""
    tokens = rules.get("added_tokens")
    flagged = set()
    for entry in tokens if isinstance(tokens, list) else ():
        name = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(name, str) and entry.get("special") is False and settings.is_control(name):
            entry["special"] = True
            flagged.add(name)
    return frozenset(flagged)


def _vocabulary(model: dict[str, Any]) -> Set[str]:
    """The tokens of the model itself, without those added to it."""
    vocab = model.get("vocab")
    return vocab.keys() if isinstance(vocab, dict) else {entry[0] for entry in vocab or ()}


def _remove_prefix(rules: dict[str, Any]) -> bool:
    """Take out the rules that put a space before a text; whether there were any."""
    found = False

    def cleaned(rule: Any) -> Any:
        nonlocal found
        if not isinstance(rule, dict):
            return rule
        for key in ("normalizers", "pretokenizers"):
            if isinstance(rule.get(key), list):
                rule[key] = [new for inner in rule[key] if (new := cleaned(inner)) is not None]
        if rule.get("type") == "Prepend":
            found = True
            return None
        for key, none in (("add_prefix_space", False), ("prepend_scheme", "never")):
            if rule.get(key) not in (None, none):
                rule[key], found = none, True
        return rule

    for part in ("normalizer", "pre_tokenizer"):
        rules[part] = cleaned(rules.get(part))
    return found
