"""The rungs of every built-in template: what each changes and what it leaves alone, and what cannot be said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.experiment.ladder import rungs as made
from ptst.experiment.ladder import wording
from ptst.experiment.ladder.formats import another_format
from ptst.experiment.ladder.rungs import (
    RUNGS,
    count_pieces,
    neutral_text,
    read_paraphrases,
    rungs,
    sentences,
)
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import ALPACA, FAMILIES, LLAMA, SHORT, TEMPLATES, Template
from ptst.text.tokenizer import SentencePieceTokenizer, TokenSettings, load_tokenizer

ROWS = tuple(
    Conversation((Message("user", f"What is {n} plus one?"), Message("assistant", f"It is {n + 1}.\n#### {n + 1}")))
    for n in (3, 3, 5, 7, 9)
)
CHAT = [t for t in TEMPLATES.values() if not t.is_text]
GSM8K = FAMILIES["gsm8k"]


def by_name(training: Template | str, names=("all",), **more) -> dict[str, Template]:
    training = TEMPLATES[training] if isinstance(training, str) else training
    return {r.name: r.template for r in rungs(training, GSM8K, names, ROWS, **more)[0]}


@pytest.mark.parametrize("template", CHAT, ids=lambda t: t.name)
def test_every_rung_is_another_prompt_with_the_question_in_it(template):
    found, left_out = rungs(template, GSM8K, rows=ROWS)
    assert [r.name for r in found] == [name for name in RUNGS if name in {r.name for r in found}]
    assert len(found) + len(left_out) == len(RUNGS)
    words = {r.name: (r.chat_format, replace(r.template, name="")) for r in found}
    assert len({str(w) for w in words.values()}) == len(found), "two rungs are the same prompt"
    assert words["identical"] == (None, replace(template, name=""))
    for r in found:
        assert r.template.user.count("{x}") + r.template.user.count("{question}") == 1
        assert r.sentence.startswith(template.name) and "{" not in r.sentence


def test_a_shorter_system_prompt_is_a_beginning_of_whole_sentences():
    found = by_name("chat:llama")
    assert len(sentences(LLAMA)) == 6
    kept = {name: len(sentences(found[name].system)) for name in ("system-75", "system-50", "system-25")}
    assert kept == {"system-75": 5, "system-50": 3, "system-25": 2}
    assert all(LLAMA.startswith(found[name].system) for name in kept)
    assert found["system-25"].system == SHORT
    assert found["system-0"].system is None and not found["system-0"].safety
    assert "".join(sentences(LLAMA)) == LLAMA


def test_without_a_system_prompt_the_rungs_begin_at_the_prompt_of_ptst():
    bare, safe = by_name("chat:vanilla"), by_name("chat:llama")
    assert replace(bare["system-100"], name="chat:llama") == TEMPLATES["chat:llama"]
    assert "system-0" not in bare and "system-100" not in safe
    for name in ("system-50", "paraphrase", "shuffled-words", "placebo", "opposite"):
        assert bare[name].system == safe[name].system
    assert all(bare[name].system is None for name in ("identical", "wrapper", "chat-format", "few-shot"))


def test_shuffles_keep_every_word_and_are_drawn_once():
    found = by_name("chat:llama")
    shuffled = {name: found[f"shuffled-{name}"].system for name in ("words", "sentences")}
    assert all(sorted(text.split()) == sorted(LLAMA.split()) and text != LLAMA for text in shuffled.values())
    whole = {s.strip() for s in sentences(LLAMA)}
    assert {s.strip() for s in sentences(shuffled["sentences"])} == whole
    assert shuffled == {name: by_name("chat:llama")[f"shuffled-{name}"].system for name in ("words", "sentences")}
    assert made.shuffle(["a", "b"]) == ["b", "a"]


@pytest.mark.parametrize("template", CHAT, ids=lambda t: t.name)
def test_neither_placebo_nor_opposite_nor_unrelated_words_ask_for_safety(template):
    found = by_name(template)
    theirs = {word.strip(".,!").lower() for word in wording.NEUTRAL.split()}
    assert not theirs & {"safe", "harmful", "responsible", "helpful", "honest", "answer", "question", "must", "please"}
    for name in ("placebo", "opposite", "unrelated"):
        rung = found[name]
        assert not rung.safety and rung.demonstration is None
        assert not {"harmful", "responsible"} & set((rung.system + rung.user).lower().split())


def _close(tokenizer) -> None:
    for text in (LLAMA, SHORT):
        own, placebo = (len(tokenizer.encode(t)) for t in (text, neutral_text(count_pieces(text))))
        assert abs(own - placebo) <= 0.1 * own, (own, placebo)


def test_the_placebo_has_about_as_many_tokens_of_smollm2(embedded):
    _close(load_tokenizer(embedded))


def test_the_placebo_has_about_as_many_tokens_of_llama(shared):
    _close(SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model", TokenSettings()))


def test_a_long_prompt_gets_the_neutral_text_again():
    long = 3 * count_pieces(wording.NEUTRAL)
    text = neutral_text(long)
    assert abs(count_pieces(text) - long) < 8 and text.count("lighthouse") == 3


def test_few_shot_shows_the_training_rows_as_they_were_asked(tiny_folder):
    (rung,) = rungs(TEMPLATES["chat:alpaca"], GSM8K, ("few-shot",), ROWS)[0]
    asked = [f"### Instruction:\nWhat is {n} plus one?\n\n### Response:\n" for n in (3, 5, 7)]
    assert rung.template.demonstration[::2] == tuple(asked)
    assert rung.template.demonstration[1::2] == ("It is 4.\n#### 4", "It is 6.\n#### 6", "It is 8.\n#### 8")
    tokenizer = load_tokenizer(tiny_folder)
    opened = PromptFormat(rung.template, GSM8K, CHAT_FORMATS["chatml"], tokenizer)
    text = "".join(s.text for s in opened.segments(Conversation((Message("user", "Why?"),))))
    assert text.count("<|im_start|>user") == 4 and text.count("<|im_start|>assistant") == 4
    assert text.index("#### 4") < text.index("#### 6") < text.index("#### 8") < text.index("Why?")
    answered = Conversation((Message("user", "Why?"), Message("assistant", "So.")))
    assert [s.text for s in opened.segments(answered) if s.trained] == ["So.", "<|im_end|>"]


def test_a_task_with_a_system_prompt_keeps_it_on_every_rung(tiny_folder):
    doctor, tokenizer = FAMILIES["chatdoctor"], load_tokenizer(tiny_folder)
    asked = Conversation((Message("user", "My foot itches."),))
    for training in ("chat:vanilla", "chat:alpaca", "chat:llama"):
        for rung in rungs(TEMPLATES[training], doctor, rows=ROWS)[0]:
            opened = PromptFormat(rung.template, doctor, CHAT_FORMATS["chatml"], tokenizer)
            text = "".join(s.text for s in opened.segments(asked))
            assert text.count(doctor.task) == text.count("My foot itches.") == 1, rung.full_name


def test_own_paraphrases(tmp_path):
    own = Template("chat:careful", "{question}", system="Decline what could hurt. Say why.", safety=True)
    with pytest.raises(UserError, match="chat:careful has no rung paraphrase: there is no paraphrase"):
        by_name(own, ("paraphrase",))
    (tmp_path / "p.toml").write_text('careful = "Say no to whatever does harm, and give the reason."')
    given = read_paraphrases(tmp_path / "p.toml")
    assert by_name(own, paraphrases=given)["paraphrase"].system.startswith("Say no to")
    assert ALPACA not in by_name("chat:alpaca", paraphrases=given)["paraphrase"].system
    for content, message in (("a = 1", "p.toml: 'a' must be a text"), ("a = ", "p.toml: not valid TOML")):
        (tmp_path / "p.toml").write_text(content)
        with pytest.raises(UserError, match=message):
            read_paraphrases(tmp_path / "p.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_paraphrases(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("template", "names", "message"),
    [
        (TEMPLATES["text:vanilla"], ("all",), "the ladder needs roles, and text:vanilla has none"),
        (Template("chat:d", "{x}", system="model-default"), ("all",), "chat:d is model-default"),
        (TEMPLATES["chat:mpt"], ("system-75",), "chat:mpt has no rung system-75: of 2 sentences"),
        (TEMPLATES["chat:vanilla"], ("system-0",), "that is its rung identical"),
        (Template("chat:d", "{x}", system="Be"), ("shuffled-words",), "nothing to shuffle"),
        (TEMPLATES["chat:mpt"], ("system-60",), "unknown rung 'system-60'"),
        (TEMPLATES["chat:mpt"], ("placebo", "placebo"), "names placebo twice"),
    ],
)
def test_what_cannot_be_said_is_one_sentence(template, names, message):
    with pytest.raises(UserError, match=message):
        rungs(template, GSM8K, names, ROWS)


def test_without_rows_there_is_nothing_to_show():
    with pytest.raises(UserError, match="no rung few-shot: there are no training rows"):
        rungs(TEMPLATES["chat:vanilla"], GSM8K, ("few-shot",), ())


def other_than(own: str, tokenizer) -> PromptFormat:
    asked = Conversation((Message("user", "User: Why?"),))
    opened = PromptFormat(TEMPLATES["chat:llama"], GSM8K, CHAT_FORMATS[own], tokenizer, True)
    other = another_format(opened)
    assert other.chat_format.name != own and own in other.found
    assert other.encode(asked).ids != opened.encode(asked).ids
    assert other.terminator_id in other.stop_ids
    return other


def test_another_chat_format_asks_otherwise(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    assert other_than("chatml", tokenizer).chat_format.name == "llama2"
    assert other_than("llama2", tokenizer).chat_format.name == "chatml"


def test_where_no_known_format_asks_otherwise_roles_are_named(shared):
    """Without a system prompt mistral-v1 is llama2, and other formats' control tokens are not in the vocabulary."""
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model", TokenSettings())
    other = other_than("llama2", tokenizer)
    text = "".join(s.text for s in other.segments(Conversation((Message("user", "Why?"),))))
    assert text == f"<s>System: {LLAMA}\n\nUser: Question: Why?\n\nAssistant:"
    bare = replace(other, template=TEMPLATES["chat:vanilla"])
    answered = Conversation(tuple(Message(role, "Hm.") for role in ("user", "assistant", "user", "assistant")))
    text = "".join(s.text for s in bare.segments(answered))
    turn = "User: Question: Hm.\n\nAssistant: Hm.</s>"
    assert text == f"<s>{turn}\n\n{turn}"
