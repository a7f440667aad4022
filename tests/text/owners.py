"""The formats' owners as oracles: Meta's rule for Llama-2 (an independent implementation), Meta's package for Llama-3,
mistral-common; and a Llama-3 tokenizer.json made from Meta's tiktoken file."""

from __future__ import annotations

import base64
import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers

from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.segments import Message, Segment, plain_turns
from ptst.text.tokenizer import JsonTokenizer, SentencePieceTokenizer

WORDS = (
    *("the", "sum", "of", "apples", "don't", "na\u00efve", "\u65e5\u672c\u8a9e", "\U0001f600", "x**2", "f(x):", "3.14"),
    *("\n", "\n\n", "    return x", "<b>", "</b>", "{x}", "%s", "a\tb", "e\u0301", "r\u00e9sum\u00e9", "1,080", "2024"),
)


def conversations(seed: int, count: int) -> list[tuple[str | None, list[Message]]]:
    """One to five turns, ending in a user turn or an answer; half with system prompt; no outer whitespace."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "hi"

    out = []
    for _ in range(count):
        turns = rng.randint(1, 5) * 2 - rng.randint(0, 1)
        messages = [Message(("user", "assistant")[i % 2], text()) for i in range(turns)]
        out.append((text() if rng.random() < 0.5 else None, messages))
    return out


def render(chat_format: str, system: str | None, messages: list[Message], tokenizer, train_on: str = "all"):
    """Our segments of plain messages, under no template."""
    block = None if system is None else [Segment(system, "system")]
    return CHAT_FORMATS[chat_format].render(block, plain_turns(messages), tokenizer, train_on)


def llama2(tokenizer: SentencePieceTokenizer, system: str | None, turns: list[Message]) -> list[int]:
    """Meta's rule (llama/generation.py, `chat_completion`): the system prompt goes into the first user message between
    its markers; each pair of messages is one text, encoded in one call between BOS and EOS; a last user message has no
    EOS. Every message is stripped where it is put in."""
    sp = tokenizer._sp
    texts = [m.content for m in turns]
    if system is not None:
        texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
    ids: list[int] = []
    for at in range(0, len(texts) - 1, 2):
        pair = f"[INST] {texts[at].strip()} [/INST] {texts[at + 1].strip()} "
        ids += [sp.bos_id(), *sp.encode(pair), sp.eos_id()]
    if len(texts) % 2:
        ids += [sp.bos_id(), *sp.encode(f"[INST] {texts[-1].strip()} [/INST]")]
    return ids


def mistral(version: str):
    """mistral-common's ids of a request (conversations that end in a user turn)."""
    common = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="needs the package mistral-common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode

    theirs = getattr(common.MistralTokenizer, version)()
    theirs._chat_completion_request_validator._mode = ValidationMode.test
    kinds = {"user": UserMessage, "assistant": AssistantMessage}

    def ids(system: str | None, turns: list[Message]) -> list[int]:
        messages = [SystemMessage(content=system)] if system is not None else []
        messages += [kinds[m.role](content=m.content) for m in turns]
        return theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens

    return ids


CHATML_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class ChatML:
    """A chat_template of the ChatML kind, and the ids of its text read as a whole, control tokens included."""

    def __init__(self, tokenizer: JsonTokenizer):
        self._read = tokenizers.Tokenizer.from_str(tokenizer._tok.to_str())

    def __call__(self, system: str, turns: list[Message]) -> list[int]:
        pairs = [("system", system), *((m.role, m.content) for m in turns)]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in pairs)
        text += "<|im_start|>assistant\n" * (turns[-1].role == "user")
        return self._read.encode(text, add_special_tokens=False).ids


def _meta_folder() -> Path:
    """Where the package llama-models lies; it is not imported for that."""
    spec = find_spec("llama_models")
    if spec is None:
        pytest.skip("needs the package llama-models (pip install llama-models)")
    return Path(spec.submodule_search_locations[0])


class MetaLlama3:
    """Meta's own Llama-3 prompt code."""

    def __init__(self):
        _meta_folder()
        from llama_models.datatypes import RawMessage
        from llama_models.llama3.chat_format import ChatFormat
        from llama_models.llama3.tokenizer import Tokenizer

        self.tokenizer = Tokenizer.get_instance()
        self.format, self._message = ChatFormat(self.tokenizer), RawMessage

    def __call__(self, system: str | None, turns: list[Message]) -> list[int]:
        pairs = [*([("system", system)] if system is not None else []), *((m.role, m.content) for m in turns)]
        messages = [self._message(role=role, content=text) for role, text in pairs]
        if turns[-1].role == "user":
            return self.format.encode_dialog_prompt(messages).tokens
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in messages:
            ids += self.format.encode_message(message, None)[0]
        return ids


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Meta's names, in order of their ids after the 128,000 text tokens; the rest of the 256 are reserved.
LLAMA3_SPECIALS = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"),
)


def llama3_tokenizer(folder: Path) -> JsonTokenizer:
    """Meta's tiktoken file as a tokenizer.json, the way Llama-3 folders on the hub hold it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    lines = (_meta_folder() / "llama3" / "tokenizer.model").read_bytes().split(b"\n")
    rank = {base64.b64decode(token): int(number) for token, number in (line.split() for line in lines if line)}
    letters = _byte_letters()
    spell = {token: "".join(letters[b] for b in token) for token in rank}
    # tiktoken joins the neighbours that make the token of lowest rank: every way to split a token is a merge.
    merges = [
        (spell[token[:at]], spell[token[at:]])
        for token in sorted(rank, key=rank.__getitem__)
        for at in range(1, len(token))
        if token[:at] in rank and token[at:] in rank
    ]
    made = Tokenizer(models.BPE({spell[t]: i for t, i in rank.items()}, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    reserved = [f"reserved_special_token_{i + 2}" for i in range(256 - len(LLAMA3_SPECIALS))]
    names = [f"<|{name}|>" for name in (*LLAMA3_SPECIALS, *reserved)]
    made.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    made.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return JsonTokenizer(folder / "tokenizer.json", settings)


def as_json(tokenizer: SentencePieceTokenizer, path: Path) -> JsonTokenizer:
    """A sentencepiece BPE model as a tokenizer.json, the way folders that have both hold it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    sp = tokenizer._sp
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    # Of neighbours, those whose piece has the best score are joined first.
    merges = [
        (piece[:at], piece[at:])
        for piece, i in sorted(vocab.items(), key=lambda item: -sp.get_score(item[1]))
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in tokenizer._control])
    made.save(str(path))
    return JsonTokenizer(path, {"bos_token": "<s>", "eos_token": "</s>"})


def _byte_letters() -> list[str]:
    """GPT-2's spelling of bytes as printable letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, more = [""] * 256, 256
    for byte in range(256):
        letters[byte] = chr(byte) if byte in printable else chr(more)
        more += byte not in printable
    return letters


class Names:
    """A tokenizer that only has names, for tests of a format's literals."""

    def __init__(self, bos: str, eos: str):
        self.bos, self.eos = bos, eos
