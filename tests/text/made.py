"""Small tokenizers of every kind that real folders have, trained on the spot: sentencepiece models with and without
user-defined pieces, and tokenizer.json files of byte-level BPE, of BPE with byte fallback and of Unigram."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path

WORDS = (
    *("the", "sum", "of", "apples", "answer", "is", "user", "assistant", "system", "im_end", "think", "12", "3.5"),
    *("\n", "\n\n", "  ", "    return x", "<b>", "a|b", "[x]", "\t", "don't", "_id_"),
    *("\u00e9t\u00e9", "\u4f60\u597d", "\U0001f600", "na\u00efve"),
)
MARKERS = ("<|im_start|>", "<|im_end|>")
HOSTILE = (*MARKERS, "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<think>", "<0x0A>", "\u2581", "<|im", "end|>")


def texts(seed: int, count: int, words: tuple[str, ...] = WORDS) -> list[str]:
    """Random texts of words with and without spaces between them."""
    rng = random.Random(seed)
    return [rng.choice(("", " ")).join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


@cache
def sentencepiece_model(kind: str = "bpe", user_defined: tuple[str, ...] = (), control: tuple[str, ...] = ()) -> bytes:
    """A sentencepiece model in the way of Llama's: byte fallback, no normalization, a dummy space."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts(1, 800)),
        model_writer=out,
        model_type=kind,
        vocab_size=480 if kind == "bpe" else 420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(user_defined),
        control_symbols=list(control),
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def converted(model: bytes, scheme: str = "prepend", added: tuple[dict, ...] = ()) -> dict:
    """A BPE model of sentencepiece as a tokenizer.json. `scheme`: how the dummy space is made, by the rule Prepend, or
    by Metaspace before every stretch of text (always) or the first (first). `added`: more added tokens."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = [
        [piece[:at], piece[at:]]
        for piece, i in sorted(vocab.items(), key=lambda item: -sp.get_score(item[1]))
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)) and piece not in MARKERS
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    prepend = [{"type": "Prepend", "prepend": "\u2581"}]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    names = [sp.id_to_piece(i) for i in range(sp.vocab_size()) if sp.is_control(i) or sp.is_unknown(i)]
    return {
        "version": "1.0",
        "added_tokens": [*(flags(vocab[name], name) for name in names), *added],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]} if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else space,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {**model, "vocab": vocab, "merges": merges},
    }


def unigram(model: bytes) -> dict:
    """A Unigram model of sentencepiece as a tokenizer.json, the way of llm-jp's folders."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_proto=model)
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    vocab = [[sp.id_to_piece(i), sp.get_score(i)] for i in range(sp.vocab_size())]
    return {
        "version": "1.0",
        "added_tokens": [flags(i, name) for i, name in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": None,
        "pre_tokenizer": space,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True},
    }


@cache
def _byte_level(pattern: str, ignore_merges: bool, specials: tuple[str, ...]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=440, initial_alphabet=letters, special_tokens=[], show_progress=False
    )  # fmt: skip
    made.train_from_iterator(texts(2, 800), trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return made.to_str()


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lo}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pattern: str = LLAMA3, ignore_merges: bool = True, specials=("<|endoftext|>",), added=()) -> dict:
    """Byte-level BPE in the way of Llama 3, Qwen and Tekken. `added`: (name, special) of more added tokens."""
    rules = json.loads(_byte_level(pattern, ignore_merges, tuple(specials)))
    size = len(rules["model"]["vocab"]) + len(specials)
    rules["added_tokens"] += [flags(size + i, name, special) for i, (name, special) in enumerate(added)]
    return rules


def flags(number: int, name: str, special: bool = True, **more: bool) -> dict:
    """An added token of a tokenizer.json."""
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": name, **common, "special": special, **more}


def write(folder: Path, *, model: bytes | None = None, rules: dict | None = None, **files: dict) -> Path:
    """A tokenizer's folder; `files` by their names without .json."""
    folder.mkdir(exist_ok=True)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    if rules is not None:
        (folder / "tokenizer.json").write_text(json.dumps(rules))
    files.setdefault("tokenizer_config", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
