"""Raw completions, by the real client: what the engine and the scorer say themselves."""

from __future__ import annotations

import pytest

from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.generation.score import score
from ptst.open import open_model
from tests.serving.running import running

PROMPTS = ("The answer is", "caf\u00e9 \u4f60\u597d, and the rest", "a")


@pytest.fixture(scope="module")
def server(tiny_folder):
    with running(tiny_folder) as server:
        yield server


@pytest.fixture(scope="module")
def complete(server, tiny_folder):
    client = server.client()
    return lambda prompt, **options: client.completions.create(
        model=f"{tiny_folder.name}@chat:plain", prompt=prompt, **{"temperature": 0, **options}
    )


@pytest.fixture(scope="module")
def model(tiny_folder):
    return open_model(str(tiny_folder), "chat:plain")


@pytest.fixture(scope="module")
def decoder(model):
    return model.load()


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.prompt_format.tokenizer


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_prompts_are_scored(complete, decoder, tokenizer, max_tokens, as_ids):
    """With echo, every token but the first has its log probability, and the most likely in its place."""
    ids = [tokenizer.encode(p) for p in PROMPTS]
    got = complete(ids if as_ids else list(PROMPTS), echo=True, logprobs=2, max_tokens=max_tokens)
    assert len(got.choices) == len(PROMPTS)
    for prompt, own, choice in zip(PROMPTS, ids, got.choices, strict=True):
        found = choice.logprobs
        assert choice.text.startswith(prompt)
        assert len(found.tokens) == len(own) + max_tokens
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        if len(own) > 1:
            (wanted,) = score(decoder, [(own, [False] + [True] * (len(own) - 1))], top_logprobs=2)
            assert found.token_logprobs[1 : len(own)] == pytest.approx(wanted.logprobs, abs=1e-4)
            for token, row, top in zip(own[1:], found.top_logprobs[1 : len(own)], wanted.top_logprobs, strict=True):
                names = {tokenizer.token_bytes(t).decode("utf-8", "ignore") for t, _ in top}
                assert all(name in row for name in names if name)
                assert 2 <= len(row) <= 3
                assert max(row.values()) == pytest.approx(top[0][1], abs=1e-4)
                name = tokenizer.token_bytes(token)
                assert (name.decode() if name.isascii() else f"bytes:\\x{name[0]:02x}") in row
        for token, start in zip(found.tokens[: len(own)], found.text_offset, strict=False):
            if not token.startswith("bytes:"):
                assert choice.text[start:].startswith(token) or not prompt.isascii()
        assert choice.finish_reason == "length"
    assert got.usage.prompt_tokens == sum(map(len, ids))
    assert got.usage.completion_tokens == max_tokens * len(ids)


def test_as_lm_eval_reads_it(complete, decoder, tokenizer):
    """Its log-likelihood of a continuation, and whether that is the greedy one, from echo with one token more."""
    context = tokenizer.encode("The answer is")
    greedy = generate(decoder, [context], {-1}, Sampling(3))[0].token_ids
    other = [(t + 1) % 200 + 10 for t in greedy]
    for continuation, is_greedy in ((greedy, True), (other, False)):
        choice = complete([context + continuation], echo=True, logprobs=1, max_tokens=1, seed=1).choices[0]
        tokens = choice.logprobs.tokens[len(context) : -1]
        top = choice.logprobs.top_logprobs[len(context) : -1]
        found = choice.logprobs.token_logprobs[len(context) : -1]
        row = (context + continuation, [False] * len(context) + [True] * len(continuation))
        assert sum(found) == pytest.approx(sum(score(decoder, [row])[0].logprobs), abs=1e-3)
        assert all(t == max(row, key=row.get) for t, row in zip(tokens, top, strict=True)) == is_greedy


def test_texts_are_continued(complete, decoder, tokenizer, model):
    got = complete(list(PROMPTS), max_tokens=6, n=2, temperature=1.1, seed=4, logprobs=0)
    for number, prompt in enumerate(PROMPTS):
        p = model.prompt_format
        asked = [tokenizer.encode(prompt)] * 2  # choices of one prompt have draws 0 and 1, whatever else is asked
        sampling = Sampling(6, 1.1, seed=4, logprobs=True)
        wanted = generate(decoder, asked, p.stop_ids, sampling, decode=tokenizer.decode_answer)
        for choice, answer in zip(got.choices[2 * number : 2 * number + 2], wanted, strict=True):
            assert choice.text == answer.text
            assert choice.logprobs.token_logprobs == pytest.approx(answer.logprobs, abs=1e-4)
            assert choice.logprobs.top_logprobs is None
    assert [choice.index for choice in got.choices] == list(range(6))


def test_stop_strings(complete, tokenizer):
    whole = complete("Once", max_tokens=40, temperature=1.3, seed=2).choices[0].text
    stop = whole[7:9]
    got = complete("Once", max_tokens=40, temperature=1.3, seed=2, stop=[stop, "\u00ff\u00ff"]).choices[0]
    assert got.text == whole[: whole.index(stop)]
    assert got.finish_reason == "stop"
    streamed = list(complete("Once", max_tokens=40, temperature=1.3, seed=2, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == got.text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_a_stream_of_several_prompts(complete):
    options = {"max_tokens": 7, "temperature": 1, "seed": 3, "logprobs": 1, "n": 2}
    whole = complete(list(PROMPTS), **options)
    chunks = [c for chunk in complete(list(PROMPTS), stream=True, **options) for c in chunk.choices]
    for choice in whole.choices:
        own = [c for c in chunks if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [t for c in own if c.logprobs for t in c.logprobs.tokens] == choice.logprobs.tokens
        assert [o for c in own if c.logprobs for o in c.logprobs.text_offset] == choice.logprobs.text_offset


def test_cached_tokens_are_told(complete):
    prompt = [list(range(20, 120))]
    first = complete(prompt, max_tokens=2).usage
    again = complete([[*prompt[0], 5]], max_tokens=2).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 100


def test_log_probabilities_of_a_chat(server, decoder, tokenizer, model, tiny_folder):
    """With the bytes of every token, whose sum is the text."""
    messages = [{"role": "user", "content": "Say \u4f60\u597d"}]
    got = server.client().chat.completions.create(
        model=f"{tiny_folder.name}@chat:plain",
        messages=messages,
        max_tokens=30,
        temperature=1.4,
        seed=9,
        logprobs=True,
        top_logprobs=4,
        extra_body={"return_token_ids": True},
    )
    sampling = Sampling(30, 1.4, seed=9, logprobs=True, top_logprobs=4)
    (wanted,) = generate(decoder, [got.prompt_token_ids], model.prompt_format.stop_ids, sampling)
    found = got.choices[0].logprobs.content
    assert got.choices[0].token_ids == wanted.token_ids
    assert [t.logprob for t in found] == pytest.approx(wanted.logprobs, abs=1e-4)
    for entry, number, top in zip(found, wanted.token_ids, wanted.top_logprobs, strict=True):
        assert bytes(entry.bytes) == tokenizer.token_bytes(number)
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [tokenizer.token_bytes(t) for t, _ in top]
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([v for _, v in top], abs=1e-4)
    joined = b"".join(bytes(t.bytes) for t in found).decode("utf-8", "replace")
    assert joined == got.choices[0].message.content
