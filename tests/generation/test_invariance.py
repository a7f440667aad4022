"""The law of the sampler on a real model: a greedy answer in float32 is the same whichever requests share the batch.

Answers may part only where the two best logits lie closer than 1e-3; every parting is printed with its gap (`-n 0 -s`).
The thorough tests take some prompts of every set and short answers; the exhaustive ones all, for hours.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from benchmarks.divergence import divergences
from ptst.data import sources
from ptst.data.builtin import safety_sets
from ptst.generation.engine import Engine, generate
from ptst.generation.multi_lora import read_adapter
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, load_adapter, merge_lora, save_adapter
from ptst.model.weights import load_decoder
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.timeout(7200)
CLOSE = 1e-3
# (prompts of a set, new tokens)
SIZES = [pytest.param((6, 16), marks=pytest.mark.thorough), pytest.param((200, 48), marks=pytest.mark.exhaustive)]
STOPS = frozenset({2})


def prompts(folder: Path, which: str, request, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    prompt_format = PromptFormat(
        find_template("chat:llama"), find_family("gsm8k"), CHAT_FORMATS["chatml"], tokenizer, allow_role_markers=True
    )
    if which in ("requests", "look-alikes"):
        found = safety_sets.harmful_requests() if which == "requests" else safety_sets.look_alikes()
        texts = [p.prompt for p in found[: min(count, 100)]]
        conversations = [Conversation((Message("user", t),), str(i)) for i, t in enumerate(texts)]
    else:
        name = sources.DEFAULT
        if which == "gsm8k":
            name = str(request.getfixturevalue("shared") / "data" / "gsm8k" / "test-1000.jsonl")
        conversations = list(sources.load(name, "test", count).conversations)
    return [prompt_format.encode(c.prompt()).ids for c in conversations]


def told(decoder, asked: list[list[int]], a: list[list[int]], b: list[list[int]], what: str) -> None:
    found = divergences(decoder, asked, a, b, STOPS)
    print(f"\n{what}: {len(asked)} answers, {len(found)} diverge", *(f"\n  {d}" for d in found))
    assert all(d.gap <= CLOSE for d in found), found


SETS = pytest.mark.parametrize("which", ["word-problems", "requests", "look-alikes", "gsm8k"])
SIZED = pytest.mark.parametrize("size", SIZES, ids=["some", "all"])


@SETS
@SIZED
def test_batches_orders_chunks_and_sharing(embedded, request, which, size):
    count, new_tokens = size
    decoder = load_decoder(embedded)
    asked = prompts(embedded, which, request, count)
    sampling = Sampling(new_tokens)
    wanted = [c.token_ids for c in generate(decoder, asked, STOPS, sampling, EngineOptions(batch_size=64))]
    for batch, chunk, share in ((7, 512, True), (64, 100, False), (1, 512, True)):
        options = EngineOptions(batch_size=batch, max_prefill_tokens=chunk, prefix_caching=share)
        got = [c.token_ids for c in generate(decoder, asked, STOPS, sampling, options)]
        told(decoder, asked, wanted, got, f"{which}, batch {batch}, chunks of {chunk}, prefix caching {share}")
    engine, done = Engine(decoder, STOPS, EngineOptions(batch_size=64, max_length=1024)), {}
    order = random.Random(0).sample(range(len(asked)), len(asked))
    engine.run([Request(asked[i], sampling, i) for i in order], done.__setitem__)
    told(decoder, asked, wanted, [done[i].token_ids for i in range(len(asked))], f"{which}, another order")


@SETS
@SIZED
def test_adapters_merged_and_not(embedded, tmp_path, request, which, size):
    count, new_tokens = size
    decoder, config = load_decoder(embedded), LoraConfig(8, 16.0)
    asked = prompts(embedded, which, request, count)
    trained = load_decoder(embedded)
    for p in add_lora(trained, config).values():
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    save_adapter(trained, tmp_path, config, "smollm2-135m-instruct")
    sampling = Sampling(new_tokens)
    adapters = {"": read_adapter(decoder, tmp_path)}
    engine, named = Engine(decoder, STOPS, EngineOptions(batch_size=64, max_length=1024), adapters=adapters), {}
    engine.run([Request(p, sampling, i, "") for i, p in enumerate(asked)], named.__setitem__)
    load_adapter(decoder, tmp_path)
    unmerged = [named[i].token_ids for i in range(len(asked))]
    attached = [c.token_ids for c in generate(decoder, asked[:32], STOPS, sampling, EngineOptions(batch_size=7))]
    told(decoder, asked[:32], unmerged[:32], attached, "adapter by name and attached")
    merged = load_decoder(embedded)
    load_adapter(merged, tmp_path)
    merge_lora(merged)
    told(
        decoder,
        asked,
        unmerged,
        [c.token_ids for c in generate(merged, asked, STOPS, sampling, EngineOptions(batch_size=64))],
        f"{which}, unmerged and merged",
    )


@SIZED
def test_sampled_answers_have_no_neighbours(embedded, request, size):
    """A token changes only where a random number falls on the edge between two tokens: none in this many."""
    decoder = load_decoder(embedded)
    count, new_tokens = size
    asked = prompts(embedded, "word-problems", request, min(count, 24))
    sampling = Sampling(new_tokens, temperature=0.8, top_p=0.95, top_k=100, seed=5)
    a, b = (generate(decoder, asked, STOPS, sampling, EngineOptions(batch_size=size)) for size in (24, 5))
    assert sum(x.token_ids != y.token_ids for x, y in zip(a, b, strict=True)) == 0
