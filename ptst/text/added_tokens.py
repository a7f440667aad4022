"""Tokens that the small files beside a tokenizer add to it or give a role: tokenizer_config.json and, in older folders,
added_tokens.json and special_tokens_map.json.

Some of them are markers (`<|im_end|>`, `[INST]`, `<think>`): control tokens, whatever their flags say, which no text
may become. Others are text that got a token of its own (a word, a run of spaces).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.reading import read_object

MAX_ID = 2**24
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_BRACKETS = frozenset("<>[]{}|\uff5c\u3010\u3011")
_AGAIN = "fetch the tokenizer's files again"


def optional_json(path: Path) -> dict:
    """The JSON object in a file of a model folder, {} where there is no file. Raises UserError for a broken one."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}


def token_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the roles of special_tokens_map.json. An `added_tokens_decoder` in the former replaced
    the two older files; where both are, it counts. Raises UserError for a broken file."""
    config = optional_json(folder / "tokenizer_config.json")
    older = optional_json(folder / "special_tokens_map.json")
    roles = {key: older[key] for key in (*_ROLES, *_LISTS) if key in older}
    return roles | config if "added_tokens_decoder" in config else config | roles


def token_name(entry: object, where: object = "tokenizer_config.json") -> str | None:
    """The name of a control token in tokenizer_config.json: a text, or an object with its content. Raises UserError for
    one that no text can hold: JSON can spell half a character."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        return None
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise UserError(f"the token name {name[:40]!a} is not valid Unicode", _AGAIN, where)
    return name


def is_marker(name: str) -> bool:
    """Whether a token's name looks like a marker rather than like text: letters or digits with brackets or bars."""
    return len(name) > 2 and not _BRACKETS.isdisjoint(name) and any(map(str.isalnum, name))


@dataclass(frozen=True)
class AddedToken:
    """A token that is added to a vocabulary, with the flags of a tokenizer.json. `lstrip`, `rstrip`: it swallows the
    whitespace on that side; `single_word`, `normalized`: where and in what text a token that is text is found."""

    name: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    @classmethod
    def of(cls, number: object, entry: object, where: object) -> "AddedToken":
        """The token of an id and its entry. Raises UserError for what is none."""
        name, digits = token_name(entry, where), str(number)
        if not name or not (digits.isascii() and digits.isdigit() and len(digits) < 9 and int(digits) < MAX_ID):
            raise UserError(f"the added token {digits[:40]!r} has no id or no name", _AGAIN, where)
        flags = entry if isinstance(entry, dict) else {}
        given = {f.name: value for f in fields(cls)[2:] if isinstance(value := flags.get(f.name), bool)}
        return cls(name, int(digits), **given)


@dataclass(frozen=True)
class TokenSettings:
    """What a folder's small files say. `special`: names that have a role; `unused`: those of padding and of unknown
    text, which no prompt holds. `adds_bos`: whether plain text gets a BOS token; `spaced`: whether text after an added
    token begins with sentencepiece's dummy space. None: not said. `is_llama`: whether the tokenizer's class is Llama's,
    which alone heeds `spaced` beside a tokenizer.json and has names of its own (`implied`) for roles without one."""

    added: tuple[AddedToken, ...] = ()
    special: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool | None = None
    spaced: bool | None = None
    is_llama: bool = False
    implied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict[str, Any], where: object = "tokenizer_config.json") -> "TokenSettings":
        """The settings in the object of a tokenizer_config.json. Raises UserError for tokens that are none."""
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise UserError("added_tokens_decoder is not an object", _AGAIN, where)
        names = {key: token_name(config.get(key), where) for key in _ROLES}
        listed = (config[key] for key in _LISTS if isinstance(config.get(key), (list, dict)))
        more = chain.from_iterable(entry.values() if isinstance(entry, dict) else entry for entry in listed)
        bos, eos = names["bos_token"], names["eos_token"]
        # `transformers` reads Llama's class by its key `legacy`, whatever a tokenizer.json says of spaces.
        llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        adds_bos, spaced = config.get("add_bos_token"), config.get("legacy", False if llama else None)
        return cls(
            tuple(AddedToken.of(number, entry, where) for number, entry in decoder.items()),
            frozenset(name for name in (*names.values(), *(token_name(entry, where) for entry in more)) if name),
            frozenset(name for key in ("pad_token", "unk_token") if (name := names[key])) - {bos, eos},
            bos,
            eos,
            adds_bos if isinstance(adds_bos, bool) else None,
            spaced if isinstance(spaced, bool) else None,
            llama,
            {key: name for key, name in _LLAMA.items() if llama and key not in config},
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenSettings":
        """The settings of a model folder. Raises UserError for a broken file, and tokens that exclude each other."""
        settings = cls.of(token_config(folder), folder / "tokenizer_config.json")
        path = folder / "added_tokens.json"
        added = [AddedToken.of(number, name, path) for name, number in optional_json(path).items()]
        return replace(settings, added=_merged((*added, *settings.added), folder))

    def is_control(self, name: str, special: bool = False) -> bool:
        """Whether a token of this name, flagged `special` or not, is a control token."""
        return special or name in self.special or is_marker(name)

    def borrows(self, name: str) -> bool:
        """Whether a token of the vocabulary that has a role is a piece of text, which some fine-tunes pad with (`!`):
        it stays text."""
        return not is_marker(name) and name not in (self.bos, self.eos)


def _merged(tokens: Iterable[AddedToken], folder: Path) -> tuple[AddedToken, ...]:
    """Each token once, as it was named last, in order of ids."""
    by_name: dict[str, AddedToken] = {}
    by_id: dict[int, AddedToken] = {}
    for token in tokens:
        for other in (by_name.get(token.name), by_id.get(token.id)):
            if other is not None and (other.name, other.id) != (token.name, token.id):
                cause = f"the added token {token.name!r} has the id {token.id}, and {other.name!r} the id {other.id}"
                raise UserError(cause, _AGAIN, folder)
        by_name[token.name] = by_id[token.id] = token
    return tuple(by_id[number] for number in sorted(by_id))
