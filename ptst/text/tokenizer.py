"""One small class over both kinds of tokenizer files: `tokenizer.model` (sentencepiece) and `tokenizer.json`.

If a folder has both, sentencepiece is used: the models were trained with it. Text never becomes a control token here,
whatever it holds; control tokens are looked up by name.
"""

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.reading import check_regular, parse_json, read_object, read_text

MAX_GROWTH = 64  # times the length of a text, by the rules of a tokenizer.json


def optional_json(path: Path) -> dict:
    """The JSON object in a file of a model folder, {} where there is no file. Raises UserError for a broken one."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}


class Tokenizer:
    """Text to ids and back. Subclasses set the attributes."""

    vocab_size: int
    bos: str | None  # names of control tokens
    eos: str | None
    adds_bos: bool  # whether the model expects BOS before plain text
    _control: dict[str, int]
    _ids: Callable[[str], list[int]]
    _piece: Callable[[int], str | None]
    decode_text: Callable[[list[int]], str]
    """Text of the ids of one run of text, without control tokens."""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Ids of a run of text. `continuation`: the text continues other text, so no dummy space precedes it.
        Raises UserError for text that is not Unicode (lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}"
            raise UserError(f"the text holds {surrogate}, which is not valid Unicode", "remove it") from None
        if not text:
            return []
        # Templates and role names recur in every row.
        return list(self._remembered(text, continuation)) if len(text) < 4096 else self._encode(text, continuation)

    @cached_property
    def _remembered(self) -> Callable[[str, bool], tuple[int, ...]]:
        return lru_cache(1024)(lambda text, continuation: tuple(self._encode(text, continuation)))

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens by name; the dummy space of each run of text is dropped."""
        runs = ((name, list(run)) for name, run in groupby(ids, self.control_names.get))
        return "".join(self.decode_text(run) if name is None else name * len(run) for name, run in runs)

    def decode_answer(self, prompt_ids: list[int], answer_ids: list[int]) -> str:
        """Text of an answer in context: decoding of all minus decoding of the prompt (its last run of text)."""
        start = max((i + 1 for i, t in enumerate(prompt_ids) if t in self.control_names), default=0)
        tail = prompt_ids[start:]
        return self.decode(tail + answer_ids)[len(self.decode(tail)) :]

    def control_id(self, name: str) -> int:
        """Id of a control token. Raises UserError when this tokenizer has none of that name."""
        if name not in self._control:
            remedy = ("choose the ", Setting("chat_format"), " that fits the model")
            raise UserError(f"this tokenizer has no control token {name!r}", remedy)
        return self._control[name]

    def has_control(self, name: str) -> bool:
        return name in self._control

    def _encode(self, text: str, continuation: bool) -> list[int]:
        if not (continuation and self._dummy_space):
            return self._ids(text)
        # A newline never merges with what follows it in a sentencepiece vocabulary: put in front, it takes the dummy
        # space, and its own ids are removed again.
        newline, ids = self._ids("\n"), self._ids("\n" + text)
        assert ids[: len(newline)] == newline, "a newline merged with the text after it"
        return ids[len(newline) :]

    @cached_property
    def _dummy_space(self) -> bool:
        """Whether a space is put before every text (sentencepiece's add_dummy_prefix)."""
        return (self._piece(self._ids("a")[0]) or "").startswith("\u2581")

    @cached_property
    def control_names(self) -> dict[int, str]:
        return {i: name for name, i in self._control.items()}


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`: Llama 1 and 2, Mistral, TinyLlama."""

    def __init__(self, path: Path, settings: dict | None = None):
        from sentencepiece import SentencePieceProcessor

        check_regular(path)
        try:
            sp = self._sp = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"not a sentencepiece model ({error})", "fetch the file again", path) from None
        self._ids, self._piece = sp.encode, sp.id_to_piece
        self.vocab_size = sp.vocab_size()
        self._control = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        self.bos = sp.id_to_piece(sp.bos_id()) if sp.bos_id() >= 0 else None
        self.eos = sp.id_to_piece(sp.eos_id()) if sp.eos_id() >= 0 else None
        self.adds_bos = self.bos is not None and (settings or {}).get("add_bos_token", True) is not False

    def decode_text(self, ids: list[int]) -> str:
        # An embedding may be padded to more rows than there are pieces; such a row has no text.
        return self._sp.decode([i for i in ids if i < self.vocab_size])


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`: Llama 3, SmolLM2 and most of today's folders."""

    def __init__(self, path: Path, settings: dict | None = None):
        import tokenizers

        self.path = path
        check_growth(path)
        try:
            self._tok = tokenizers.Tokenizer.from_file(str(path))
            opening = self._tok.encode("", add_special_tokens=True).ids
        except BaseException as error:
            raise self._explain(error, "not a tokenizer file") from None
        self._tok.no_padding()
        self._tok.no_truncation()
        settings, self._piece = settings or {}, self._tok.id_to_token
        self.vocab_size = self._tok.get_vocab_size(with_added_tokens=True)
        added = self._tok.get_added_tokens_decoder()
        self._control = {token.content: i for i, token in added.items() if token.special}
        self.bos, self.eos = (token_name(settings.get(k)) for k in ("bos_token", "eos_token"))
        self.adds_bos = self.bos is not None and self._control.get(self.bos) in opening
        self._tok.encode_special_tokens = True

    def _ids(self, text: str) -> list[int]:
        # The fast form returns ids without their offsets in the text.
        try:
            return self._tok.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on a text") from None

    def decode_text(self, ids: list[int]) -> str:
        try:
            return self._tok.decode(ids, skip_special_tokens=False) if ids else ""
        except BaseException as error:
            raise self._explain(error, "the tokenizer fails on ids") from None

    def _explain(self, error: BaseException, cause: str) -> BaseException:
        """The UserError for an error of the library: it raises bare Exception for every kind of damage, and a panic of
        Rust (by a regular expression that backtracks for ever, say), which is no Exception."""
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            return error  # Ctrl-C
        return UserError(f"{cause} ({error})", "fetch the file again", self.path)


def check_growth(path: Path) -> None:
    """Raise UserError for a tokenizer.json whose replacements make texts more than 64 times as long: three rules can
    fill any memory."""
    try:
        text = read_text(path)
        if '"Replace"' not in text and '"Prepend"' not in text:
            return
        whole = parse_json(text)
        parts = [whole.get("normalizer"), whole.get("decoder")] if isinstance(whole, dict) else []
        factor = max(map(_growth, parts), default=1.0)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a tokenizer file ({error})", "fetch the file again", path) from None
    if factor > MAX_GROWTH:
        raise UserError("its replacements make texts more than 64 times as long", "fetch the file again", path)


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


def load_tokenizer(folder: Path | str, embedding_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder. Raises UserError if it is missing or damaged, or has more tokens than the model
    has embedding rows."""
    folder = Path(folder)
    settings = optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.model").exists():
        tokenizer: Tokenizer = SentencePieceTokenizer(folder / "tokenizer.model", settings)
    elif (folder / "tokenizer.json").exists():
        tokenizer = JsonTokenizer(folder / "tokenizer.json", settings)
    else:
        raise UserError("there is no tokenizer.model and no tokenizer.json", "copy the tokenizer into it", folder)
    if embedding_rows is not None and tokenizer.vocab_size > embedding_rows:
        sizes = f"{tokenizer.vocab_size} tokens and the model only {embedding_rows} embedding rows"
        raise UserError(f"the tokenizer has {sizes}", "use the tokenizer that belongs to the model", folder)
    if tokenizer.eos is None or not tokenizer.has_control(tokenizer.eos):
        raise UserError("there is no end-of-sequence token", "name it as eos_token in tokenizer_config.json", folder)
    return tokenizer


def token_name(entry: object) -> str | None:
    """The name of a control token in tokenizer_config.json: a text, or an object with its content."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None
