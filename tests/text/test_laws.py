"""The ten laws of the text layer (docs/chat-formats.md), on hostile text, over every template x format x tokenizer.

Each law is a property of a case: a conversation under a template, a format and a tokenizer. Every case is put to all
ten, since most of the time goes into making it: 2,000 cases in the ordinary suite, 20,000 with `-m thorough`, 100,000
with `-m exhaustive`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptst.audit.reference.formats import reference, template_words
from ptst.data.examples import prepare
from ptst.data.sources import Source
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.detect import find_format
from ptst.text.encode import Example
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES
from ptst.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from tests.conftest import EMBEDDED, SHARED, mistral_tokenizer
from tests.text import folders, owners
from tests.tiny import byte_tokenizer

PIECES = (
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|endoftext|>",
    ),
    *("[INST]", " [/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n", "{x}", "{question}", "{task}", "{{", "%s", "### Response:"),
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\u2581", "\u2581the", "\x00", "\x7f", "\ufeff", "\ufffd"),
    *("e\u0301", "\u0323\u0307", "\u200b", "\u200d", "\u202e", "\u2066", "\u3000", "\xa0", "\ufdfa", "\uac01"),
    *("123", "4,5", "0", "3.14", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "the", " a", "answer", "\u65e5\u672c"),
)
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(max_size=20),
    st.sampled_from(["", " ", "\n", "\u2581"]),
)
LONG = 100_000  # characters of a long line
RARE = 150  # one case in so many has one


@dataclass(frozen=True)
class Case:
    prompt_format: PromptFormat
    conversation: Conversation
    train: str
    number: int  # for a law's own choices: where to cut, which message to spoil

    @cached_property
    def whole(self) -> Example:
        return self.prompt_format.encode(self.conversation, self.train)

    @cached_property
    def ends(self) -> list[int]:
        """Which messages are trained."""
        found = [i for i, m in enumerate(self.conversation.messages) if m.role == "assistant"]
        return found if self.train == "all" else found[-1:]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Ids of the generation prompt of every trained message, encoded as at test time."""
        messages = self.conversation.messages
        return [self.prompt_format.encode(Conversation(messages[:end])).ids for end in self.ends]

    @cached_property
    def said(self) -> list[list[int]]:
        """From each prompt's end to the first terminator: what the model would have to sample."""
        stop = self.stop
        starts = [len(p) for p in self.prompts]
        return [self.whole.ids[n : self.whole.ids.index(stop, n) + 1] for n in starts]

    @property
    def stop(self) -> int:
        return self.prompt_format.terminator_id

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompt_format.tokenizer

    @property
    def chat_format(self) -> str:
        return self.prompt_format.chat_format.name

    @cached_property
    def runs(self) -> list[list]:
        """Segments, grouped as they are encoded: a control token, or a stretch of text encoded in one call."""
        segments = self.prompt_format.segments(self.conversation, self.train)
        calls = [0]
        for before, segment in pairwise(segments):
            calls.append(calls[-1] + (segment.control or before.control or segment.apart))
        return [[s for _, s in group] for _, group in groupby(zip(calls, segments, strict=True), lambda pair: pair[0])]


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.control_names[i] for i in ids if i in tokenizer.control_names]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tok")
    byte_tokenizer().save(str(folder / "bytes.json"))
    settings_ = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    found: dict[str, Tokenizer] = {"bytes": JsonTokenizer(folder / "bytes.json", settings_)}
    for name, path in {
        "llama2": SHARED / "tokenizers/llama2.tokenizer.model",
        "tok512": SHARED / "models/stories260K/tok512.model",
    }.items():
        if path.exists():
            found[name] = SentencePieceTokenizer(path)
    if find_spec("mistral_common"):
        found |= {f"mistral-{v}": mistral_tokenizer(v) for v in ("v1", "v3")}
    if find_spec("llama_models"):
        found["llama3"] = owners.llama3_tokenizer(folder)
    if EMBEDDED.exists():
        found["smollm2"] = load_tokenizer(EMBEDDED)
    return found | derive_shapes(folder)


NEEDS = {"mistral-v3": "[/INST]", "llama3": "<|eot_id|>", "chatml": "<|im_start|>"}
# Chat templates, by the name of their tokenizer, whose formats are derived.
SHAPES = {
    "derived-zephyr": (folders.ZEPHYR, ()),
    "derived-vicuna": (folders.VICUNA, ()),
    "derived-gemma": (folders.GEMMA, folders.CONTROL["gemma"]),
    "derived-reasoning": (folders.REASONING, folders.CONTROL["reasoning"]),
    "derived-unended": (folders.UNENDED, ()),
}
FORMATS = dict(CHAT_FORMATS)  # and the derived ones, once they are


def derive_shapes(folder: Path) -> dict[str, Tokenizer]:
    """Derive the formats of the chat templates; returns their tokenizers."""
    found = {}
    for name, (template, controls_) in SHAPES.items():
        (folder / name).mkdir()
        found[name] = load_tokenizer(folders.write_folder(folder / name, template, controls_))
        FORMATS[name] = find_format(folder / name, found[name]).chat_format
    return found


def pairs(tokenizers: dict[str, Tokenizer]) -> list[tuple[str, str]]:
    """Every format on every tokenizer that can say it."""
    every = [(name, f) for name in sorted(tokenizers) for f in ("llama2", "mistral-v1", *NEEDS)]
    every = [pair for pair in every if pair[0] not in SHAPES] + [(name, name) for name in SHAPES]
    return [(name, f) for name, f in every if f not in NEEDS or tokenizers[name].has_control(NEEDS[f])]


@st.composite
def cases(draw, tokenizers: dict[str, Tokenizer]) -> Case:
    name, chat_format = draw(st.sampled_from(pairs(tokenizers)))
    template = TEMPLATES[draw(st.sampled_from(sorted(TEMPLATES)))]
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    turns = 1 if template.is_text else draw(st.integers(1, 3))
    texts = [draw(TEXT) for _ in range(2 * turns)]
    number = draw(st.integers(0, 10**6))
    if draw(st.sampled_from(range(RARE))) == RARE // 2:
        at = number % len(texts)
        texts[at] = ((texts[at] or "ab ") * LONG)[:LONG]
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    if not template.is_text and draw(st.booleans()):
        messages.insert(0, Message("system", draw(TEXT)))
    train = draw(st.sampled_from(["all", "last"]))
    has_system = len(messages) % 2 or template.system is not None or family.task is not None
    if chat_format == "mistral-v3" and has_system:  # its system prompt moves, so it can train the last answer only
        train = "last"
    if FORMATS[chat_format].history is not None:
        train = "last"
    prompt_format = PromptFormat(template, family, FORMATS[chat_format], tokenizers[name], True)
    return Case(prompt_format, Conversation(tuple(messages)), train, number)


def law_1_trained_is_what_the_model_samples(case: Case) -> None:
    wanted = [False] * len(case.whole.ids)
    for prompt, said in zip(case.prompts, case.said, strict=True):
        wanted[len(prompt) : len(prompt) + len(said)] = [True] * len(said)
    assert case.whole.loss_mask == wanted


def law_2_the_prompt_is_a_prefix(case: Case) -> None:
    for prompt in case.prompts:
        assert case.whole.ids[: len(prompt)] == prompt


def law_3_round_trip(case: Case) -> None:
    p = case.prompt_format
    join = " " if case.chat_format in ("llama2", "mistral-v1") else ""
    if p.chat_format.is_derived:
        join = "".join(s.text for s in p.chat_format.answer_prefix)
    if p.template.is_text:
        join = p.family.join if p.template.join is None else p.template.join
    several = sum(m.role == "assistant" for m in case.conversation.messages) > 1
    close = " " if case.chat_format == "llama2" and several else ""
    stop = case.tokenizer.control_names[case.stop]
    for end, prompt, said in zip(case.ends, case.prompts, case.said, strict=True):
        spelled = case.tokenizer.decode_answer(prompt, said)
        assert spelled == join + case.conversation.messages[end].content + close + stop or case.whole.lossy


def law_4_control_tokens_come_from_the_format(case: Case) -> None:
    """The control tokens are those that the format's owner puts, in order, whatever the texts spell."""
    p, messages = case.prompt_format, case.conversation.messages
    bos, eos = p.tokenizer.bos, p.tokenizer.eos
    pairs_ = (len(messages) + 1) // 2 - len(messages) % 2 + (p.template.demonstration is not None)
    has_system = not p.template.is_text and (
        messages[0].role == "system" or p.template.system is not None or p.family.task is not None
    )
    header, turn = ["<|start_header_id|>", "<|end_header_id|>"], ["<|im_start|>", "<|im_end|>"]
    wanted = {
        "llama2": [bos, eos] * pairs_,
        "mistral-v1": [bos] + [eos] * pairs_,
        "mistral-v3": [bos] + ["[INST]", "[/INST]", eos] * pairs_,
        "llama3": [bos] + [*header, "<|eot_id|>"] * (2 * pairs_ + has_system),
        "chatml": turn * (2 * pairs_ + has_system),
    }.get(case.chat_format)
    if p.chat_format.is_derived:
        runs = reference(case.conversation, p, case.train).runs if messages[-1].role == "assistant" else []
        wanted = [run.prompt for _, run in runs if run.control]
    if p.template.is_text:
        wanted = [bos, eos] if p.tokenizer.opening else [eos]
    assert controls(p.tokenizer, case.whole.ids) == wanted


def law_5_bos_and_stop(case: Case) -> None:
    bos = case.tokenizer.control_id(case.tokenizer.bos)
    assert not any(a == b == bos for a, b in pairwise(case.whole.ids))
    if not case.prompt_format.template.is_text and case.prompt_format.chat_format.has_bos(case.tokenizer):
        assert case.whole.ids[0] == bos
    for prompt, said in zip(case.prompts, case.said, strict=True):
        assert said[-1] == case.stop
        assert case.whole.loss_mask[len(prompt) + len(said) - 1]


def law_6_natural_or_a_reported_token_boundary(case: Case) -> None:
    """Text between control tokens is one call of the tokenizer, unless that would change the prompt's ids."""
    encode, ids = case.tokenizer.encode, case.whole.ids
    at, token_boundaries = 0, []
    for run in case.runs:
        if run[0].control:
            wanted = [case.tokenizer.control_id(run[0].text)]
        else:
            prompt = encode("".join(s.text for s in run if not s.sampled))
            wanted = encode("".join(s.text for s in run))
            if wanted[: len(prompt)] != prompt:
                token_boundaries.append(at + len(prompt))
                reply = "".join(s.text for s in run if s.sampled)
                wanted = prompt + encode(reply, continuation=True)
        assert ids[at : at + len(wanted)] == wanted
        at += len(wanted)
    assert at == len(ids)
    assert case.whole.token_boundaries == tuple(token_boundaries)


def law_7_nothing_is_cut_in_silence(case: Case) -> None:
    other = Conversation((Message("user", "one"), Message("assistant", "two")))
    rows = (case.conversation, other)
    encoded = [case.prompt_format.encode(c, case.train) for c in rows]
    limit = 1 + case.number % (len(case.whole.ids) + 1)
    for too_long in ("drop", "cut"):
        kept, counts = prepare(Source("rows", "plain", rows), case.prompt_format, limit, too_long, case.train)
        long = [e for e in encoded if len(e.ids) > limit]
        assert (counts.dropped if too_long == "drop" else counts.cut) == len(long)
        assert counts.rows == len(rows) == len(kept) + counts.dropped + counts.untrained
        wanted = [e for e in encoded if too_long == "cut" or len(e.ids) <= limit]
        wanted = [e for e in wanted if any(e.loss_mask[:limit])]
        assert [(k.ids, k.loss_mask) for k in kept] == [(w.ids[:limit], w.loss_mask[:limit]) for w in wanted]


def law_9_lossy_text_is_told(case: Case) -> None:
    at, differs = 0, []
    for run in case.runs:
        text = "".join(s.text for s in run)
        if run[0].control:
            at += 1
            continue
        following = next(
            (i for i in range(at, len(case.whole.ids)) if case.whole.ids[i] in case.tokenizer.control_names), None
        )
        end = len(case.whole.ids) if following is None else following
        if case.chat_format == "llama3" and not case.prompt_format.template.is_text and text == "\n\n":
            end = at + 1  # a header's end: what follows is encoded in a call of its own
        if case.tokenizer.decode(case.whole.ids[at:end]) != text:
            differs.append(run)
        at = end
    assert len(case.whole.lossy) == len(differs)
    for told, run in zip(case.whole.lossy, differs, strict=True):
        texts = [s.text for s in run if s.author == told.author]
        assert any(told.character == text[told.offset : told.offset + 1] for text in texts)
    messages = list(case.conversation.messages)
    chosen = case.number % len(messages)
    text = messages[chosen].content
    place = case.number % (len(text) + 1)
    messages[chosen] = replace(messages[chosen], content=f"{text[:place]}\udc80{text[place:]}")
    with pytest.raises(ValueError, match=r"lone surrogate, U\+DC80"):
        case.prompt_format.encode(Conversation(tuple(messages)), case.train)


def law_10_authors(case: Case) -> None:
    """User, assistant and system prompt have written what the data and the template's system prompt say, to the letter;
    all else is scaffold."""
    conversation, segments = case.conversation, [s for run in case.runs for s in run]
    by_author = {a: [s.text for s in segments if s.author == a] for a in ("user", "assistant", "system")}
    for role in ("user", "assistant"):
        assert by_author[role] == [m.content for m in conversation.messages if m.role == role]
    task = case.prompt_format.family.task if conversation.system is None else conversation.system
    assert set(by_author["system"]) <= {template_words(conversation, case.prompt_format)[0], task}
    assert case.prompt_format.template.is_text or (task or "") in "".join(by_author["system"])
    assert all(s.author == "scaffold" for s in segments if s.control)


@pytest.fixture(scope="module")
def theirs(tokenizers):
    """Per tokenizer, its format and the owner's way from (system prompt, turns) to ids."""
    found = {}
    if "llama2" in tokenizers:
        found["llama2"] = "llama2", lambda system, turns: owners.llama2(tokenizers["llama2"], system, turns)
    for version in ("v1", "v3"):
        if f"mistral-{version}" in tokenizers:
            chat_format = "mistral-v1" if version == "v1" else "mistral-v3"
            found[f"mistral-{version}"] = chat_format, owners.mistral(version)
    if "llama3" in tokenizers:
        found["llama3"] = "llama3", owners.MetaLlama3()
    for name in {"bytes", "smollm2"} & set(tokenizers):
        found[name] = "chatml", owners.ChatML(tokenizers[name])
    return found


@st.composite
def owned(draw, theirs) -> tuple[str, str, list[Message]]:
    """A conversation that the owner renders as we do: an explicit system prompt, several turns, no outer whitespace, no
    role markers (which would become control tokens for the owner, or are refused here)."""
    name = draw(st.sampled_from(sorted(theirs)))
    forged = [*CHAT_FORMATS[theirs[name][0]].role_markers, *owners.CHATML_MARKS]

    def text() -> str:
        drawn = draw(TEXT)
        while any(mark in drawn for mark in forged):
            for mark in forged:
                drawn = drawn.replace(mark, "")
        return drawn.strip() or "hi"

    turns = [Message(("user", "assistant")[i % 2], text()) for i in range(draw(st.sampled_from([1, 3, 5])))]
    return name, text(), turns


def law_8_the_owners_ids(tokenizers, theirs, drawn) -> None:
    name, system, turns = drawn
    chat_format, owner = theirs[name]
    prompt_format = PromptFormat(
        TEMPLATES["chat:plain"], FAMILIES["plain"], CHAT_FORMATS[chat_format], tokenizers[name]
    )
    conversation = Conversation((Message("system", system), *turns))
    assert prompt_format.encode(conversation).ids == owner(system, turns)


LAWS = [law for name, law in sorted(globals().items()) if name.startswith("law_") and "law_8" not in name]


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def all_ten(tokenizers, theirs, data) -> None:
    case = data.draw(cases(tokenizers))
    for law in LAWS:
        law(case)
    law_8_the_owners_ids(tokenizers, theirs, data.draw(owned(theirs)))


@examples(2000)
@given(data=st.data())
def test_all_laws(tokenizers, theirs, data):
    all_ten(tokenizers, theirs, data)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@examples(20_000)
@given(data=st.data())
def test_all_laws_thoroughly(tokenizers, theirs, data):
    all_ten(tokenizers, theirs, data)


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
@examples(100_000)
@given(data=st.data())
def test_all_laws_exhaustively(tokenizers, theirs, data):
    all_ten(tokenizers, theirs, data)


def test_the_laws_are_ten():
    assert sorted(int(law.__name__.split("_")[1]) for law in (*LAWS, law_8_the_owners_ids)) == list(range(1, 11))
