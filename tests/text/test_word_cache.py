"""Ids of remembered words are those of the whole text, under every pre-tokenizer for which words are remembered."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest

from ptst.text.json_tokenizer import KNOWN, JsonTokenizer
from ptst.text.word_cache import MOST, WordCache
from tests.text.made import HOSTILE, WORDS

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_RAW = _BYTES | {"use_regex": False}
_SPLITS = [
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in KNOWN
]
_DIGITS = {"type": "Digits", "individual_digits": True}


def _sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


RULES = {
    "gpt2": {"pre_tokenizer": _BYTES},
    "smollm2": {"pre_tokenizer": _sequence(_DIGITS, _BYTES)},
    "llama3": {"pre_tokenizer": _sequence(_SPLITS[0], _RAW)},
    "qwen2": {"pre_tokenizer": _sequence(_SPLITS[1], _RAW), "normalizer": {"type": "NFC"}},
}
OTHERS = {
    "a space before texts": {"pre_tokenizer": _BYTES | {"add_prefix_space": True}},
    "no words": {"pre_tokenizer": _RAW},
    "words of another kind": {"pre_tokenizer": _sequence({"type": "Punctuation", "behavior": "Isolated"}, _BYTES)},
    "spaces that are removed": {"pre_tokenizer": _sequence(_SPLITS[0] | {"behavior": "Removed"}, _RAW)},
    "texts that are rewritten": {"pre_tokenizer": _BYTES, "normalizer": {"type": "NFKC"}},
}
_SPACES = (" ", " ", " ", "  ", "\n", " \n", "\n ", "\t", "\r\n", "\u00a0", "\u2003", "\x1c", "\x85 ", "")
_MORE = (*WORDS, *HOSTILE, "e\u0301", "\u0301x", "'s", "'S", "\u2019ll", "1234567", "\u0663", "tool call", "a" * 60)


def _hostile(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(_SPACES) + rng.choice(_MORE) for _ in range(rng.randint(1, 9))) + rng.choice(_SPACES)
        for _ in range(count)
    ]


@cache
def _trained() -> dict:
    """A byte-level BPE with merges over everything that stands side by side, whitespace above all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=special)
    between = ["".join(random.Random(n).choices(_SPACES, k=4)) for n in range(500)]
    tok.train_from_iterator([*between, *_hostile(99, 300)], trainer)
    return json.loads(tok.to_str())


def _tokenizer(folder, changes: dict, added: tuple[dict, ...] = ()) -> JsonTokenizer:
    rules = {**_trained(), **changes}
    rules["added_tokens"] = [*rules["added_tokens"], *added]
    rules["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(rules))
    return JsonTokenizer(path, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def _added(name: str, **flags) -> dict:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 1500, "content": name, **off, **flags}


@pytest.mark.parametrize("name", RULES)
def test_remembered_words_change_no_ids(tmp_path, name):
    tokenizer = _tokenizer(tmp_path, RULES[name], (_added("tool"),))
    assert tokenizer._words is not None
    remembered = 0
    for seed in range(4):
        asked = _hostile(seed, 400) + [" ".join(random.Random(seed).choices(WORDS[:10], k=8)) for _ in range(50)]
        found = tokenizer.encode_all((text, False) for text in asked)
        remembered += sum(ids is not None for ids in tokenizer._words.encode_all(asked))
        for text in asked:
            assert found[text, False] == tokenizer._encode_with(tokenizer._tok, text), repr(text)
    assert remembered > 100


@pytest.mark.parametrize("name", OTHERS)
def test_under_other_rules_nothing_is_remembered(tmp_path, name):
    assert _tokenizer(tmp_path, OTHERS[name])._words is None


@pytest.mark.parametrize("token", [_added("tool call"), _added("tool", lstrip=True), _added("tool", single_word=True)])
def test_a_token_of_text_that_may_take_a_space(tmp_path, token):
    assert _tokenizer(tmp_path, RULES["gpt2"], (token,))._words is None


def test_what_is_remembered_is_bounded():
    encoded: list[str] = []

    def encode(words):
        encoded.extend(words)
        return [[len(word)] for word in words]

    words = WordCache(encode)
    for at in range(0, 2 * MOST, 1000):
        assert words.encode_all([f"a w{i} b" for i in range(at, at + 1000)])[7] == [1, len(f" w{at}"), 2]
        assert len(words._first) + len(words._later) <= MOST + 1002
    assert encoded.count(" b") == 2  # forgotten once
