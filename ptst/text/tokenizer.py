"""The tokenizer of a model folder: one, from `tokenizer.json` or `tokenizer.model` (sentencepiece).

Where both are there and agree, sentencepiece is used: the models were trained with it. Where tokenizer.json says more
(role markers that a fine-tune added), or tokenizer.model is of another kind, it is tokenizer.json. Text never becomes
a control token, whatever it holds; control tokens are looked up by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ptst.errors import UserError
from ptst.progress import say_once
from ptst.reading import check_regular
from ptst.text.added_tokens import AddedToken, TokenSettings, optional_json, token_name
from ptst.text.base_tokenizer import Origin, Tokenizer
from ptst.text.json_tokenizer import JsonTokenizer
from ptst.text.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = ("AddedToken", "JsonTokenizer", "SentencePieceTokenizer", "TokenSettings", "Tokenizer")
__all__ += ("load_tokenizer", "optional_json", "token_name")  # type: ignore[assignment]

_PROBES = ("The sum of 12 apples", "don't\n\n  two\t", "Na\u00efve \u65e5\u672c\u8a9e \U0001f600", "x**2 = f(x):")


def load_tokenizer(folder: Path | str, embedding_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder. Says where two files differ which one is used. Raises UserError if it is missing
    or damaged, or has more tokens than the model has embedding rows; control tokens without a row are left out, with a
    note."""
    folder = Path(folder)
    settings = TokenSettings.from_folder(folder)
    tokenizer = _open(folder, settings)
    if tokenizer.eos is None and (name := _configured_end(folder, tokenizer)) is not None:
        tokenizer = _open(folder, replace(settings, eos=name, special=settings.special | {name}))
    tokenizer.origin = Origin(tokenizer.origin.path, folder=folder, rows=embedding_rows)
    if embedding_rows is not None:
        tokenizer = _within(tokenizer, embedding_rows, folder)
    if tokenizer.eos is None or not tokenizer.has_control(tokenizer.eos):
        named = f"the tokenizer has no token {tokenizer.eos!r}, which is named as eos_token"
        nowhere = "there is no end-of-sequence token, neither of the tokenizer nor in config.json"
        cause = nowhere if tokenizer.eos is None else named
        raise UserError(cause, "name the right one as eos_token in tokenizer_config.json", folder)
    return tokenizer


def configured_ends(folder: Path) -> Iterator[tuple[str, int]]:
    """(file, id) of the tokens that end an answer by generation_config.json and config.json, in this order. Raises
    UserError for an id that is no whole number."""
    for name in ("generation_config.json", "config.json"):
        named = optional_json(folder / name).get("eos_token_id")
        for number in named if isinstance(named, list) else [named]:
            if number is not None and type(number) is not int:
                cause = f"eos_token_id is {str(number)[:40]!a}"
                raise UserError(cause, "write a token's id, or a list of ids, as whole numbers", folder / name)
            if number is not None and number >= 0:  # -1 stands for none
                yield name, number


def _configured_end(folder: Path, tokenizer: Tokenizer) -> str | None:
    """The first token that ends answers by the model's own files, where the tokenizer's name none. Says so."""
    names = {i: name for name, i in tokenizer.tokens.items()}
    for file, number in configured_ends(folder):
        if number in names:
            what = f"{names[number]!r}, eos_token_id {number} of {file}"
            say_once(f"note: {folder}: the tokenizer names no end-of-sequence token; it is {what}")
            return names[number]
    return None


def _open(folder: Path, settings: TokenSettings) -> Tokenizer:
    model, rules = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not rules.exists():
        older = (folder / "vocab.json").exists()  # with merges.txt, the older form of tokenizer.json
        remedy = "save its vocab.json as tokenizer.json, with transformers" if older else "copy the tokenizer into it"
        raise UserError("there is no tokenizer.model and no tokenizer.json", remedy, folder)
    if not rules.exists():
        return SentencePieceTokenizer(model, settings)
    by_rules = JsonTokenizer(rules, settings)
    if not model.exists():
        return by_rules
    check_regular(model)
    try:
        pieces = SentencePieceTokenizer(model, settings)
    except UserError as error:
        difference: str | None = error.cause if isinstance(error.cause, str) else str(error)
    else:
        difference = _difference(pieces, by_rules, settings)
        pieces.spaced, pieces.opening, pieces.implied = by_rules.spaced, by_rules.opening, by_rules.implied
    if difference is None:
        return pieces
    say_once(f"note: {folder}: tokenizer.json is used; tokenizer.model beside it differs: {difference}")
    return by_rules


def _difference(pieces: SentencePieceTokenizer, rules: JsonTokenizer, settings: TokenSettings) -> str | None:
    """What tokenizer.json says otherwise than tokenizer.model, or besides, in words. Tokens for padding do not count:
    no prompt holds them."""
    vocabulary = rules.tokens
    for name, number in pieces.tokens.items():
        if vocabulary.get(name) != number:
            return f"its token {number} is {name!r}"
    more = {name for name in vocabulary.keys() - pieces.tokens.keys() if name not in settings.unused}
    more |= {name for name in rules.control_names.values() if not pieces.has_control(name)} - settings.unused
    if more := more - {"<unk>"}:
        return f"it lacks {min(more)!r}" if len(more) == 1 else f"it lacks {len(more)} tokens, {min(more)!r} among them"
    for text in _PROBES:
        if pieces._ids(text) != rules._ids(text):
            return f"it gives {text!r} other ids"
    return None


def _within(tokenizer: Tokenizer, rows: int, folder: Path) -> Tokenizer:
    """The tokenizer, without control tokens that have no embedding row. Raises UserError where text, or a prompt's
    beginning or end, would need such a token."""
    beyond = {name: i for name, i in tokenizer.tokens.items() if i >= rows}
    if not beyond:
        return tokenizer
    names = beyond.keys() - {tokenizer.bos, tokenizer.eos}
    if names != beyond.keys() or not all(map(tokenizer.has_control, names)):
        sizes = f"{max(beyond.values()) + 1} tokens and the model only {rows} embedding rows"
        raise UserError(f"the tokenizer has {sizes}", "use the tokenizer that belongs to the model", folder)
    first = ", ".join(sorted(beyond, key=beyond.__getitem__)[:5])
    say_once(f"note: {folder}: without an embedding row, and therefore left out: {first}" + " ..." * (len(beyond) > 5))
    return tokenizer.limited(rows)
