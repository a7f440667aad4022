"""The owners' ids, on a thousand random conversations per format, and each difference from them by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptst.text import known_differences
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.chat_template import default_system_prompt, render_chat_template
from ptst.text.encode import encode
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import mistral_tokenizer
from tests.text import folders, owners
from tests.text.owners import render

COUNT = 1000
FIGURES = Path(__file__).with_name("figures.json")


@pytest.fixture(scope="module")
def llama2(shared):
    return SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")


@pytest.fixture(scope="module")
def meta():
    return owners.MetaLlama3()


@pytest.fixture(scope="module")
def llama3(meta, tmp_path_factory):
    return owners.llama3_tokenizer(tmp_path_factory.mktemp("llama3"))


def ours(chat_format, tokenizer, system, turns):
    return encode(render(chat_format, system, turns, tokenizer), tokenizer).ids


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_mistral(version):
    """mistral-common encodes requests, so conversations end in a user turn; earlier answers are compared with them."""
    theirs, tokenizer = owners.mistral(version), mistral_tokenizer(version)
    chat_format = {"v1": "mistral-v1", "v7": "mistral-v7"}.get(version, "mistral-v3")
    for system, turns in owners.conversations(int(version[1]), COUNT):
        asked = turns if turns[-1].role == "user" else turns[:-1]
        assert ours(chat_format, tokenizer, system, asked) == theirs(system, asked), (system, asked)


def as_meta_closes(turns, ids, tokenizer):
    """SINGLE_TURN_CLOSE undone: the space before </s> that a lone answer does not get."""
    if len(turns) == 2:
        assert ids[-1] == tokenizer.control_id("</s>")
        return [*ids[:-1], *tokenizer.encode(" ", continuation=True), ids[-1]]
    return ids


def test_llama2(llama2):
    """Against an independent implementation of Meta's rule, training form included. A single answer closes without
    Meta's space; that difference is undone by encoding the pair as Meta's text."""
    for system, turns in owners.conversations(2, COUNT):
        wanted = owners.llama2(llama2, system, turns)
        assert as_meta_closes(turns, ours("llama2", llama2, system, turns), llama2) == wanted, (system, turns)


def test_the_reference_of_metas_rule_is_metas(shared, llama2):
    """The recorded ids come from Meta's own code; rows hold whitespace and unicode."""
    rows = [json.loads(line) for line in (shared / "golden/llama2_chat.jsonl").read_text().splitlines()]
    assert len(rows) >= 25
    for row in rows:
        messages = Conversation(tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        assert owners.llama2(llama2, messages.system, list(messages.turns)) == row["tokens"], row["messages"]


def test_llama3(meta, llama3):
    for system, turns in owners.conversations(3, COUNT):
        assert ours("llama3", llama3, system, turns) == meta(system, turns), (system, turns)


def test_llama3_keeps_outer_whitespace_as_meta_does(meta, llama3):
    for text in (" a ", "\n\na\n", "", " ", "\n"):
        turns = [Message("user", text), Message("assistant", text), Message("user", text)]
        assert ours("llama3", llama3, text, turns) == meta(text, turns), text
        assert encode(render("llama3", text, turns, llama3), llama3).token_boundaries == (), (
            "each text has a call of its own"
        )


def test_the_rebuilt_llama3_tokenizer_is_metas(meta, llama3):
    texts = [m.content for _, turns in owners.conversations(33, 300) for m in turns]
    for text in (*texts, "<|eot_id|>", "<|begin_of_text|>x", "a" * 200, "  \r\n\t ", "\x00\u200b\ufeff", "1234567"):
        ids = meta.tokenizer.encode(text, bos=False, eos=False)
        assert llama3.encode(text) == ids, text
        assert llama3.decode(ids) == text


def test_recorded_training_rows(llama2, llama3):
    """Meta's ids of conversations that end in an assistant's turn, recorded: they hold whatever the packages become."""
    recorded = json.loads(FIGURES.read_text())
    for chat_format, tokenizer in {"llama2": llama2, "llama3": llama3}.items():
        assert len(recorded[chat_format]) == 20
        for row in recorded[chat_format]:
            turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(row["turns"])]
            assert turns[-1].role == "assistant"
            ids = ours(chat_format, tokenizer, row["system"], turns)
            assert (as_meta_closes(turns, ids, tokenizer) if chat_format == "llama2" else ids) == row["ids"]


def test_smollm2(embedded):
    """Against the folder's own chat_template: text and ids, with a system prompt in every conversation."""
    tokenizer = load_tokenizer(embedded)
    given = [(system if system is not None else "Be brief.", turns) for system, turns in owners.conversations(9, COUNT)]
    rows = [[{"role": "system", "content": s}, *(as_dict(m) for m in turns)] for s, turns in given]
    texts = render_chat_template(embedded, rows)
    # The template's text is read as a whole, control tokens included.
    tokenizer._tok.encode_special_tokens, tokenizer._kept_out = False, frozenset()
    for (system, turns), text in zip(given, texts, strict=True):
        segments = render("chatml", system, turns, tokenizer)
        assert "".join(s.text for s in segments) == text
        assert encode(segments, tokenizer).ids == tokenizer.encode(text)


def as_dict(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


# The known differences, each by its name.


def test_every_known_difference_has_a_test():
    text = Path(__file__).read_text()
    for name, value in vars(known_differences).items():
        if isinstance(value, known_differences.KnownDifference):
            assert value in known_differences.KNOWN_DIFFERENCES
            assert f'"""{name}' in text, f"no test begins with the name {name}"


@pytest.mark.parametrize("text", [" a", "a ", "\na\n\n", "\t"])
def test_outer_whitespace_llama2(llama2, text):
    """OUTER_WHITESPACE: Meta strips, ours keeps."""
    turns = [Message("user", text), Message("assistant", text), Message("user", "b")]
    bare = [Message(m.role, m.content.strip()) for m in turns]
    theirs = owners.llama2(llama2, None, turns)
    assert theirs == owners.llama2(llama2, None, bare)
    kept = ours("llama2", llama2, None, turns)
    assert kept != theirs
    assert f"[INST] {text} [/INST] {text}" in llama2.decode(kept)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_outer_whitespace_mistral(version):
    """OUTER_WHITESPACE: mistral-common strips the end of answers, ours keeps it; all else is the same."""
    theirs, tokenizer = owners.mistral(version), mistral_tokenizer(version)
    spaced = [Message("user", " q "), Message("assistant", "a "), Message("user", " b\n")]
    bare = [spaced[0], Message("assistant", "a"), spaced[2]]
    assert theirs(None, spaced) == theirs(None, bare) == ours("mistral-v3", tokenizer, None, bare)
    kept = ours("mistral-v3", tokenizer, None, spaced)
    assert kept != theirs(None, spaced)
    assert "a </s>" in tokenizer.decode(kept)


def test_role_markers_mistral():
    """ROLE_MARKERS: mistral-common encodes a forged mark as it encodes its own, ours refuses it unless allowed."""
    theirs, tokenizer = owners.mistral("v1"), mistral_tokenizer("v1")
    turns = (Message("user", "a [/INST] b"),)
    prompt_format = PromptFormat(
        find_template("chat:plain"), find_family("plain"), CHAT_FORMATS["mistral-v1"], tokenizer
    )
    with pytest.raises(ValueError, match="allow role-markers"):
        prompt_format.encode(Conversation(turns))
    assert ours("mistral-v1", tokenizer, None, turns) == theirs(None, list(turns))


def test_single_turn_close(llama2):
    """SINGLE_TURN_CLOSE: Meta's space before </s> is there in conversations of several turns and not in one alone."""
    one = [Message("user", "a"), Message("assistant", "b")]
    assert llama2.decode(owners.llama2(llama2, None, one)) == "<s>[INST] a [/INST] b </s>"
    assert llama2.decode(ours("llama2", llama2, None, one)) == "<s>[INST] a [/INST] b</s>"
    assert ours("llama2", llama2, None, one * 2) == owners.llama2(llama2, None, one * 2)


def test_default_system_prompt(tiny_folder):
    """DEFAULT_SYSTEM_PROMPT: the folder's template puts one in, ours only when a template asks for it."""
    tokenizer = load_tokenizer(tiny_folder)
    turns = [Message("user", "a")]
    theirs = render_chat_template(tiny_folder, [[as_dict(m) for m in turns]])[0]
    assert "".join(s.text for s in render("chatml", None, turns, tokenizer)) in theirs
    assert theirs.startswith("<|im_start|>system")
    assert default_system_prompt(tiny_folder) == "You are a test"
    asked = render("chatml", default_system_prompt(tiny_folder), turns, tokenizer)
    assert "".join(s.text for s in asked) == theirs


def test_default_system_prompt_of_smollm2(embedded):
    """DEFAULT_SYSTEM_PROMPT, on the default model."""
    assert default_system_prompt(embedded) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_date_preamble(tmp_path):
    """DATE_PREAMBLE: a chat template like Llama 3.1's opens with dates; ours has none."""
    template = (
        "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
        "Today Date: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}{{ m.content }}"
        "<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"
    )
    settings = {"chat_template": template, "bos_token": "<|begin_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = render_chat_template(tmp_path, [[{"role": "user", "content": "hi"}]])[0]
    assert "Today Date: " in theirs
    segments = render("llama3", None, [Message("user", "hi")], owners.Names("<|begin_of_text|>", "<|eot_id|>"))
    spelled = "".join(s.text for s in segments)
    assert "Date" not in spelled
    assert theirs.endswith(spelled.removeprefix("<|begin_of_text|>"))


def test_long_runs(meta, llama3):
    """LONG_RUNS: Meta's code cuts them, ours does not; long lines with spaces are the same."""
    words, run = "cat 12 " * 15_000, "0" * 25_001 + "1"
    assert ours("llama3", llama3, None, [Message("user", words)]) == meta(None, [Message("user", words)])
    kept, theirs = ours("llama3", llama3, None, [Message("user", run)]), meta(None, [Message("user", run)])
    assert kept != theirs
    assert llama3.decode(kept) == llama3.decode(theirs)


# Differences from chat templates; the owners' here are written in tests/text/folders.py.


def opened(folder, template, names=(), chat_format=None):
    """The prompt format of a folder with this chat template, and its text of a conversation of two turns."""
    folders.write_folder(folder, template, names)
    p = open_prompt_format(folder, find_template("chat:plain"), "plain", chat_format, allow_role_markers=True)
    return p, lambda *texts, system="S": "".join(s.text for s in p.segments(conversation(system, texts), "last"))


def conversation(system, texts):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Conversation((*([] if system is None else [Message("system", system)]), *turns))


def theirs(folder, *texts, system="S"):
    return render_chat_template(folder, [[as_dict(m) for m in conversation(system, texts).messages]])[0]


def test_outer_whitespace_llama3(tmp_path):
    """OUTER_WHITESPACE: the chat template strips, ours keeps, as Meta's code."""
    p, ours = opened(tmp_path, folders.LLAMA3, folders.CONTROL["llama3"])
    assert p.found.endswith("but for outer-whitespace")
    assert "\n\nQ<|eot_id|>" in theirs(tmp_path, " Q ")
    assert "\n\n Q <|eot_id|>" in ours(" Q ")


def test_control_space(tmp_path):
    """CONTROL_SPACE: Mistral's chat templates write the space that sentencepiece puts by itself."""
    p, ours = opened(tmp_path, folders.MISTRAL_V1.replace("'[INST] '", "' [INST] '"))
    assert p.found.endswith("but for control-space")
    assert theirs(tmp_path, "Q").startswith("<s> [INST]")
    assert ours("Q").startswith("<s>[INST]")


def test_answer_space(tmp_path):
    """ANSWER_SPACE: the first chat templates of Mistral put none before an answer."""
    p, ours = opened(tmp_path, folders.MISTRAL_V1.replace("' ' + m.content", "m.content"))
    assert p.found.endswith("but for answer-space")
    assert theirs(tmp_path, "Q", "A").endswith("[/INST]A</s>")
    assert ours("Q", "A").endswith("[/INST] A</s>")


def test_lost_system_prompt(tmp_path):
    """LOST_SYSTEM_PROMPT: where a conversation ends in an answer, the system prompt is not rendered."""
    p, ours = opened(tmp_path, folders.MISTRAL_V3, folders.CONTROL["mistral-v3"])
    assert p.found.endswith("but for lost-system-prompt")
    assert "S" in theirs(tmp_path, "Q").split("[INST]")[1]
    assert theirs(tmp_path, "Q", "A") == "<s>[INST]Q[/INST]A</s>"
    assert ours("Q", "A") == "<s>[INST]S\n\nQ[/INST]A</s>"


def test_system_in_user_turn(tmp_path):
    """SYSTEM_IN_USER_TURN: the chat template refuses system prompts, ours puts them before the question."""
    p, ours = opened(tmp_path, folders.GEMMA, folders.CONTROL["gemma"])
    assert "system-in-user-turn" in p.chat_format.differences
    with pytest.raises(ValueError, match="no system role"):
        theirs(tmp_path, "Q")
    assert ours("Q") == theirs(tmp_path, "S\n\nQ", system=None)


def test_row_end(tmp_path):
    """ROW_END: a generation prompt after the last answer, too."""
    p, ours = opened(tmp_path, folders.TRAILING)
    assert p.chat_format.differences == ("row-end",)
    assert theirs(tmp_path, "Q", "A").endswith("A</s>\n<|assistant|>\n")
    assert ours("Q", "A").endswith("A</s>")


def test_generation_prompt(tmp_path):
    """GENERATION_PROMPT: one that opens a reasoning block, which no answer follows in the owner's conversations."""
    p, ours = opened(tmp_path, folders.REASONING, folders.CONTROL["reasoning"])
    assert "generation-prompt" in p.chat_format.differences
    assert theirs(tmp_path, "Q") == ours("Q") == "<s>S<|User|>Q<|Assistant|><think>\n"
    assert theirs(tmp_path, "Q", "A") == "<s>S<|User|>Q<|Assistant|>A</s>"
    assert ours("Q", "A") == "<s>S<|User|>Q<|Assistant|><think>\nA</s>"
    assert ours("Q", "A", "R") == theirs(tmp_path, "Q", "A", "R")


def test_no_terminator(tmp_path):
    """NO_TERMINATOR: answers that nothing ends get EOS, the newest ones."""
    p, ours = opened(tmp_path, folders.UNENDED)
    assert p.chat_format.differences == ("no-terminator",)
    assert theirs(tmp_path, "Q", "A") + "</s>" == ours("Q", "A")
    assert theirs(tmp_path, "Q", "A", "R", "B") + "</s>" == ours("Q", "A", "R", "B")


def test_empty_reasoning(tmp_path):
    """EMPTY_REASONING: Qwen3's block before the last answer is not trained; a format has it in the prompt."""
    block = "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content + "
    template = folders.CHATML.replace("m.content + ", block)
    p, ours = opened(tmp_path, template, folders.CONTROL["chatml"])
    assert p.found.endswith("but for empty-reasoning")
    assert "<think>" in theirs(tmp_path, "Q", "A")
    assert "<think>" not in ours("Q", "A")
    _, ours = opened(tmp_path, template, folders.CONTROL["chatml"], "derived")
    assert theirs(tmp_path, "Q", "A", "R", "B") == ours("Q", "A", "R", "B")


def test_text_dependent(tmp_path):
    """TEXT_DEPENDENT: reasoning is cut out of answers, ours keeps it."""
    p, ours = opened(tmp_path, folders.REASONING, folders.CONTROL["reasoning"])
    assert "text-dependent" in p.chat_format.differences
    assert "because" not in theirs(tmp_path, "Q", "because</think>A")
    assert "because" in ours("Q", "because</think>A")


def test_fixed_date(tmp_path):
    """FIXED_DATE: today's is always the same day, in the form that the template asks for."""
    p, _ = opened(tmp_path, folders.DEFAULT.replace("im_start", "turn"), ("<|turn|>", "<|im_end|>"))
    assert p.chat_format.differences == ("default-system-prompt", "fixed-date")
    assert "It is 26 Jul 2024." in theirs(tmp_path, "Q", system=None)
    assert default_system_prompt(tmp_path) == "It is 26 Jul 2024."


def test_dummy_space(tmp_path):
    """DUMMY_SPACE: a tokenizer.json that puts sentencepiece's space before the first text only."""
    folders.write_folder(tmp_path, folders.ZEPHYR)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    letters = {letter: i for i, letter in enumerate(("<s>", "</s>", "\u2581", *map(chr, range(32, 127)), "\n"))}
    rules["model"] |= {"vocab": letters, "merges": []}
    rules["added_tokens"] = rules["added_tokens"][:2]
    rules["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    rules["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    read = load_tokenizer(tmp_path)._tok
    read.encode_special_tokens = False
    marked = read.encode("</s>a", add_special_tokens=False).ids
    assert marked == [letters["</s>"], letters["a"]]
    kept = load_tokenizer(tmp_path)
    assert len(kept.encode("a")) == 2  # with the space


def test_tight_marker(tmp_path):
    """TIGHT: the paper's self-reminder has no space before [/INST], the owners have one."""
    folders.write_folder(tmp_path, folders.MISTRAL_V1)
    p = open_prompt_format(tmp_path, find_template("chat:self-reminder"), "plain", allow_role_markers=True)
    spelled = "".join(s.text for s in p.segments(conversation(None, ("Q",))))
    assert spelled.endswith("content![/INST]")
    assert theirs(tmp_path, "content!", system=None).endswith("content! [/INST]")


def test_token_boundary(tmp_path):
    """TOKEN_BOUNDARY: a line break that begins an answer joins the one before it when all is read at once."""
    p, ours = opened(tmp_path, folders.CHATML, folders.CONTROL["chatml"])
    encoded = p.encode(conversation(None, ("Q", "\nA")))
    assert ours("Q", "\nA", system=None) == theirs(tmp_path, "Q", "\nA", system=None)
    assert encoded.token_boundaries
    assert len(encoded.ids) == len(p.tokenizer.encode_markers(theirs(tmp_path, "Q", "\nA", system=None))) + 1


def test_empty_system_prompt(tmp_path):
    """EMPTY_SYSTEM_PROMPT: mistral-common and templates that ask whether there is a text leave it out; ours, as most
    templates do, writes an empty block."""
    dropping = "{% if not messages[0].content %}{% set messages = messages[1:] %}{% endif %}" + folders.CHATML
    _, ours = opened(tmp_path, dropping, folders.CONTROL["chatml"], "chatml")
    assert theirs(tmp_path, "Q", system="") == theirs(tmp_path, "Q", system=None)
    assert ours("Q", system="") == "<|im_start|>system\n<|im_end|>\n" + ours("Q", system=None)
    tokenizer = mistral_tokenizer("v1")
    assert owners.mistral("v1")("", [Message("user", "Q")]) == owners.mistral("v1")(None, [Message("user", "Q")])
    assert tokenizer.decode(ours_ids("mistral-v1", tokenizer, "", "Q")) == "<s>[INST] \n\nQ [/INST]"


def ours_ids(chat_format, tokenizer, system, *texts):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return encode(render(chat_format, system, turns, tokenizer), tokenizer).ids


# Foreign templates that mean harm.


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", "Range too big|did not end"),
        ("{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}", "did not end within 1 s"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "forbids"),
        ("{{ messages.append(1) }}", "forbids"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "forbids"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{% if %}", "cannot be rendered"),
        ("{{ raise_exception('only user turns') }}", "only user turns"),
        ("{{ messages[0].name.first }}", "cannot be rendered"),
    ],
)
def test_foreign_templates_are_held(tmp_path, template, says):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=says) as told:
        render_chat_template(tmp_path, [[{"role": "user", "content": "hi"}]], seconds=1)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)
