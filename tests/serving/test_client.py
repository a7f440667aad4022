"""The real `openai` client against the server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.open import open_model
from ptst.text.segments import Conversation, Message
from tests.serving.running import running

openai = pytest.importorskip("openai", reason="the client comes with .[dev]")


@pytest.fixture(scope="module")
def server(tiny_folder):
    with running(tiny_folder, template=("chat:plain", "chat:llama")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def model(tiny_folder):
    return f"{tiny_folder.name}@chat:plain"


@pytest.fixture(scope="module")
def expect(tiny_folder):
    """What the engine itself answers to a user's text."""
    opened = open_model(str(tiny_folder), "chat:plain")
    decoder = opened.load()
    p = opened.prompt_format

    def answer(text: str, template: str = "chat:plain", **sampling):
        under = opened.with_template(template).prompt_format
        ids = under.encode(Conversation((Message("user", text),))).ids
        (found,) = generate(decoder, [ids], p.stop_ids, Sampling(**sampling), decode=p.tokenizer.decode_answer)
        return ids, found

    return answer


def ask(client, model, text, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_models_are_listed(client, model):
    listed = client.models.list().data
    assert [m.id for m in listed] == [model, model.replace("chat:plain", "chat:llama")]
    assert client.models.retrieve(model).template == "chat:plain"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nobody@chat:plain")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("template", ["chat:plain", "chat:llama"])
def test_a_chat_is_answered_as_by_the_engine(client, model, expect, template):
    ids, wanted = expect("Hello there", template, max_new_tokens=12)
    name = model.replace("chat:plain", template)
    got = ask(client, name, "Hello there", max_tokens=12, temperature=0, extra_body={"return_token_ids": True})
    assert got.prompt_token_ids == ids
    assert (got.choices[0].message.content, got.choices[0].token_ids) == (wanted.text, wanted.token_ids)
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), len(wanted.token_ids))
    assert got.model == name


def test_seeds_decide_sampled_answers(client, model, expect):
    _, wanted = expect("Hi", max_new_tokens=10, temperature=1.2, top_p=0.9, seed=7)
    options = {"max_tokens": 10, "temperature": 1.2, "top_p": 0.9}
    got = [ask(client, model, "Hi", seed=7, **options) for _ in range(2)]
    assert [g.choices[0].message.content for g in got] == [wanted.text] * 2
    drawn = ask(client, model, "Hi", **options)
    again = ask(client, model, "Hi", seed=drawn.seed, **options)
    assert again.choices[0].message.content == drawn.choices[0].message.content
    assert drawn.seed != ask(client, model, "Hi", **options).seed


def test_a_stream_has_the_same_answer(client, model):
    options = {"max_tokens": 20, "temperature": 1, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, model, "Count", **options)
    chunks = list(ask(client, model, "Count", stream=True, stream_options={"include_usage": True}, **options))
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own][-1] == choice.finish_reason
        assert own[0].delta.role == "assistant"
        tokens = [t for c in own if c.logprobs for t in c.logprobs.content]
        assert [t.token for t in tokens] == [t.token for t in choice.logprobs.content]
        assert all(len(t.top_logprobs) == 2 for t in tokens)
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_fifty_at_once_are_answered_as_each_alone(client, model, expect):
    """Greedy and sampled, with different lengths: nobody's answer depends on the others."""
    texts = [f"Question {i}" * (1 + i % 5) for i in range(50)]
    options = [{"max_tokens": 4 + i % 9, "temperature": 0.9 * (i % 2), "seed": i} for i in range(50)]
    with ThreadPoolExecutor(50) as pool:
        got = list(pool.map(lambda i: ask(client, model, texts[i], **options[i]), range(50)))
    for i in range(50):
        o = options[i]
        _, wanted = expect(texts[i], max_new_tokens=o["max_tokens"], temperature=o["temperature"], seed=i)
        assert got[i].choices[0].message.content == wanted.text


def test_errors_are_those_of_the_client(client, model):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, model, "Hi", presence_penalty=0.5)
    assert (error.value.param, error.value.code) == ("presence_penalty", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, model, "Hi", max_tokens=10**6)
    assert (error.value.param, error.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        ask(client, "gpt-4", "Hi")
