"""How other programs read a rendered chat template: the whole text in one call, and control tokens wherever a text
spells them.

They differ in one thing: where the space of sentencepiece goes. llama.cpp, and a tokenizer.json of Llama 2 read as it
stands, put one before every text that follows a control token, as Meta does. `transformers` 5 builds Llama's class anew
and puts it there only with `"legacy": true` in tokenizer_config.json, else before the first text alone.
"""

import re
from dataclasses import dataclass, field

from ptst.text.json_tokenizer import JsonTokenizer
from ptst.text.prompt_format import PromptFormat
from ptst.text.tokenizer import Tokenizer, TokenSettings


def spelled_names(tokenizer: Tokenizer) -> list[str]:
    """What other programs read as a token wherever a text spells it: the names of control tokens, and of the unknown
    token."""
    tokens = tokenizer.tokens
    unknown = ("<unk>",) if "<unk>" in tokens else ()
    return sorted(filter(None, {*tokenizer.control_names.values(), *unknown}), key=tokens.__getitem__)


@dataclass(frozen=True)
class Reader:
    """A way to read. `rules`: the tokenizer whose library reads the whole text; None: it is cut at the `names` of
    control tokens (with their ids). `spaces`: for a text that is cut, where sentencepiece's space goes: `own` as the
    tokenizer has it, `first` before the first text alone, `every` before every text. `settings`: what
    tokenizer_config.json must say."""

    name: str
    tokenizer: Tokenizer
    names: dict[str, int]
    rules: Tokenizer | None = None
    spaces: str = "own"
    settings: dict[str, bool] = field(default_factory=dict)

    def read(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        if self.rules is not None and (ids := self.rules.encode_markers(text)) is not None:
            return ids
        # The longest name first, as all libraries do.
        cut = re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")
        ids = []
        at, after = 0, None
        for match in [*cut.finditer(text), None]:
            if piece := text[at : match.start() if match else len(text)]:
                ids += self._piece(piece, at, after)
            if match:
                ids.append(self.names[match[0]])
                at, after = match.end(), match[0]
        return ids

    def _piece(self, piece: str, at: int, after: str | None) -> list[int]:
        if self.spaces == "own":
            return self.tokenizer.encode(piece, after=after)
        return self.tokenizer.encode(piece, continuation=self.spaces == "first" and at > 0)


def readers(prompt_format: PromptFormat) -> list[Reader]:
    """The ways in which the text of this folder may be read, the one that needs no other setting first."""
    tokenizer, folder = prompt_format.tokenizer, prompt_format.folder
    rules: Tokenizer | None = tokenizer if isinstance(tokenizer, JsonTokenizer) else None
    settings = TokenSettings() if folder is None else TokenSettings.from_folder(folder)
    if rules is None and folder is not None and (folder / "tokenizer.json").exists():
        rules = JsonTokenizer(folder / "tokenizer.json", settings)
    tokens = tokenizer.tokens
    names = {name: tokens[name] for name in spelled_names(tokenizer)}
    if settings.is_llama and tokenizer.encode("a") != tokenizer.encode("a", continuation=True):
        legacy = Reader("transformers", tokenizer, names, rules, "every")
        if settings.spaced:
            return [legacy]
        first = Reader("transformers", tokenizer, names, None, "first")
        return [first, Reader(legacy.name, tokenizer, names, rules, "every", {"legacy": True})]
    if rules is None:
        return [Reader("tokenizer.model, between control tokens", tokenizer, names)]
    return [Reader("tokenizer.json", tokenizer, names, rules)]
