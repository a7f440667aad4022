"""The owners' ids on a thousand random conversations: mistral-common live, and the model's own chat_template."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource

import pytest

from ptst.text.encode import encode
from ptst.text.formats import render
from ptst.text.segments import Message
from ptst.text.tokenizer import load_tokenizer
from tests.conftest import mistral_tokenizer

COUNT = 1000
WORDS = (
    *("the", "sum", "of", "apples", "don't", "na\u00efve", "\u65e5\u672c\u8a9e", "\U0001f600", "x**2", "f(x):", "3.14"),
    *("\n", "\n\n", "    return x", "<b>", "</b>", "{x}", "%s", "a\tb", "e\u0301", "r\u00e9sum\u00e9", "1,080", "2024"),
)


def conversations(seed: int) -> list[tuple[str | None, list[Message]]]:
    """One to five turns, ending in a user turn or an answer, with and without system text, without outer whitespace."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "hi"

    out = []
    for _ in range(COUNT):
        turns = rng.randint(1, 5) * 2 - rng.randint(0, 1)
        messages = [Message(("user", "assistant")[i % 2], text()) for i in range(turns)]
        out.append((text() if rng.random() < 0.5 else None, messages))
    return out


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_mistral_common(version):
    common = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="needs the package mistral-common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode

    theirs = getattr(common.MistralTokenizer, version)()
    theirs._chat_completion_request_validator._mode = ValidationMode.test
    ours = mistral_tokenizer(version)
    chat_format = "mistral-v1" if version == "v1" else "mistral-v3"
    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    for system, turns in conversations(int(version[1])):
        asked = turns if turns[-1].role == "user" else turns[:-1]
        messages = [SystemMessage(content=system)] if system is not None else []
        messages += [kinds[m.role](content=m.content) for m in asked]
        wanted = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert encode(render(chat_format, system, asked, ours), ours).ids == wanted, (system, asked)


def _render_all(template: str, rows: list, out) -> None:
    """In a child process with limits on time and memory: a template is a program of somebody else's."""
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    out.send([compiled.render(messages=m, add_generation_prompt=m[-1]["role"] == "user") for m in rows])


def test_smollm2s_own_chat_template(embedded):
    """Spelling and ids. Without a system text SmolLM2's template puts a default one in; ours puts none, on purpose, so
    those rows are compared with the default text given."""
    own = json.loads((embedded / "tokenizer_config.json").read_text())["chat_template"]
    tokenizer = load_tokenizer(embedded)
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    given = [(system if system is not None else default, turns) for system, turns in conversations(9)]
    rows = [
        [{"role": "system", "content": s}, *({"role": m.role, "content": m.content} for m in turns)]
        if index % 2 or s != default
        else [{"role": m.role, "content": m.content} for m in turns]
        for index, (s, turns) in enumerate(given)
    ]
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_render_all, args=(own, rows, send))
    child.start()
    assert receive.poll(90), "the template did not come to an end"
    spelled = receive.recv()
    child.join()
    tokenizer._tok.encode_special_tokens = False  # the template's text is read as a whole, marks and all
    for (system, turns), text in zip(given, spelled, strict=True):
        segments = render("chatml", system, turns, tokenizer)
        assert "".join(s.text for s in segments) == text
        assert encode(segments, tokenizer).ids == tokenizer._tok.encode(text, add_special_tokens=False).ids
