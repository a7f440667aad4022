"""What the small files beside a tokenizer say, read by the audit itself.

This is the oracle's own reading of tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json and config.json; it has nothing in common with the text layer's but the files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.reading import read_object

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
EXTRA = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class Flags:
    """An added token's id and the flags that change how text is read."""

    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class Said:
    """`roles`: the tokens that have a role, by the role. `named`: all tokens that a file calls special. `added`: tokens
    with the ids that a file gives them. `opens`: whether a text gets BOS; `spaced`: whether a dummy space follows added
    tokens; None where nothing is said. `llama`: whether the class is Llama's, whose own names for roles that no file
    mentions are `implied`."""

    roles: Mapping[str, str]
    named: frozenset[str]
    added: Mapping[str, Flags]
    opens: bool | None = None
    spaced: bool | None = None
    llama: bool = False
    implied: Mapping[str, str] = field(default_factory=dict)

    @property
    def bos(self) -> str | None:
        return self.roles.get("bos_token")

    @property
    def eos(self) -> str | None:
        return self.roles.get("eos_token")

    @property
    def unused(self) -> frozenset[str]:
        """Tokens that no prompt holds: those for padding and for unknown text."""
        got = {self.roles[key] for key in ("pad_token", "unk_token") if key in self.roles}
        return frozenset(got - {self.bos, self.eos})

    def controls(self, name: str, special: bool = False) -> bool:
        """Whether a token is a control token: it is flagged so, has a role, or looks like a marker."""
        return special or name in self.named or looks_like_marker(name)

    def is_text(self, name: str) -> bool:
        """Whether a piece of the vocabulary that has a role all the same stands for text (`!` for padding)."""
        return not looks_like_marker(name) and name not in (self.bos, self.eos)


def looks_like_marker(name: str) -> bool:
    """`<|im_end|>`, `[INST]`, `<s>`: three characters or more, a bracket or bar and a letter or digit among them."""
    brackets = any(c in "<>[]{}|\uff5c\u3010\u3011" for c in name)
    return len(name) >= 3 and brackets and any(c.isalnum() for c in name)


def _name(entry: Any) -> str | None:
    entry = entry["content"] if isinstance(entry, Mapping) and "content" in entry else entry
    return entry if isinstance(entry, str) else None


def _flags(number: Any, entry: Any) -> Flags:
    given = entry if isinstance(entry, Mapping) else {}
    keys = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return Flags(int(number), **{key: given[key] for key in keys if isinstance(given.get(key), bool)})


def said_in(config: Mapping[str, Any], older: Mapping[str, Any] | None = None) -> Said:
    """What the object of a tokenizer_config.json says; `older`: that of an added_tokens.json."""
    roles = {role: name for role in ROLES if (name := _name(config.get(role))) is not None}
    named = {name for name in roles.values() if name}
    for key in EXTRA:
        group = config.get(key) or ()
        entries: Iterable[Any] = group.values() if isinstance(group, Mapping) else group
        named |= {name for name in map(_name, entries) if name}
    added = {name: Flags(int(number)) for name, number in (older or {}).items()}
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        added[_name(entry) or ""] = _flags(number, entry)
    llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    opens, spaced = config.get("add_bos_token"), config.get("legacy", False if llama else None)
    return Said(
        roles,
        frozenset(named),
        dict(sorted(added.items(), key=lambda item: item[1].id)),
        opens if isinstance(opens, bool) else None,
        spaced if isinstance(spaced, bool) else None,
        llama,
        {role: name for role, name in LLAMA.items() if llama and role not in config},
    )


def said_by(settings: Any) -> Said:
    """What settings given by hand say: the object of a tokenizer_config.json, or the text layer's record of one, of
    which the plain fields are taken."""
    if settings is None or isinstance(settings, Mapping):
        return said_in(settings or {})
    roles = {f"{role}_token": name for role in ("bos", "eos") if (name := getattr(settings, role)) is not None}
    added = {t.name: Flags(t.id, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized) for t in settings.added}
    more = (settings.adds_bos, settings.spaced, settings.is_llama, settings.implied)
    return Said(roles, settings.special, added, *more)


def said_by_folder(folder: Path) -> Said:
    """What the files of a model folder say. In special_tokens_map.json, roles count where tokenizer_config.json has no
    added_tokens_decoder."""
    config, roles = optional(folder / "tokenizer_config.json"), optional(folder / "special_tokens_map.json")
    roles = {key: value for key, value in roles.items() if key in (*ROLES, *EXTRA)}
    both = {**roles, **config} if "added_tokens_decoder" in config else {**config, **roles}
    return said_in(both, optional(folder / "added_tokens.json"))


def optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    return read_object(path) if path.exists() else {}


def ends_in(folder: Path) -> list[int]:
    """The ids that end an answer by generation_config.json and config.json."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = optional(folder / name).get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
    return found


def broken(what: str, path: Path) -> UserError:
    """A tokenizer file that cannot be read."""
    return UserError(what, "fetch the file again", path)
