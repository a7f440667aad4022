"""The oracle shares nothing with the text layer, agrees with it on every tokenizer, and finds what is spoiled."""

from __future__ import annotations

import ast
import json
import random
from copy import copy
from dataclasses import replace

import pytest

from ptst.audit.documents import check_documents
from ptst.audit.reference.formats import Oracle
from ptst.audit.reference.tokenizer import open_reference_tokenizer
from ptst.audit.reference.tokenizer_check import check_tokenizer
from ptst.audit.reference.words import TASKS, WORDINGS
from ptst.audit.report import audit
from ptst.audit.setup import Setup
from ptst.data.packing import to_batch
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import FAMILIES, TEMPLATES, find_template, load_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.conftest import ROOT, mistral_tokenizer
from tests.text import made
from tests.text.test_added_tokens import KINDS
from tests.text.test_laws import PIECES

MODULES = ("formats", "json_tokenizer", "sentencepiece_tokenizer", "roles", "settings", "tokenizer", "words")
TYPES = {"Conversation", "open_chat_template"}  # messages, and the sandbox of chat templates


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_the_pipeline_is_imported(module):
    tree = ast.parse((ROOT / "ptst/audit/reference" / f"{module}.py").read_text())
    taken = {
        (node.module, name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }
    assert {name for place, name in taken if place.startswith(("ptst.text", "ptst.data"))} <= TYPES


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, tiny_folder):
    root = tmp_path_factory.mktemp("kinds")
    found = {name: load_tokenizer(make(root / str(i))) for i, (name, make) in enumerate(KINDS.items())}
    found["tiny"] = load_tokenizer(tiny_folder)
    found["unigram pieces"] = load_tokenizer(made.write(root / "u", model=made.sentencepiece_model("unigram")))
    return found


def hostile(count: int) -> list[str]:
    rng = random.Random(5)
    pieces = (*PIECES, *made.WORDS, *made.HOSTILE)
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(count)]
    ranges = ((0x20, 0x300), (0x20, 0xD800), (0xE000, 0x110000))
    return texts + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(8)) for _ in range(count // 3)]


def agree(ours, name: str, texts: list[str]) -> None:
    for like in (False, True):
        read = ours.like_transformers() if like else ours
        own = open_reference_tokenizer(ours.origin, like)
        assert own.names == read.control_names
        assert (own.bos, own.eos, own.file.opening) == (read.bos, read.eos, read.opening), name
        assert (own.lstrip, own.rstrip, own.vocabulary) == (read.lstrip, read.rstrip, read.tokens)
        for continuation, after in ((False, None), (False, read.eos), (False, "<|im_start|>"), (True, None)):
            bare = own.is_bare(after, continuation)
            found = own.encode((text, bare) for text in texts)
            for text in texts:
                ids = read.encode(text, continuation=continuation, after=after)
                assert found[text, bare] == ids, (name, text)
                if continuation:
                    continue
                decoded = read.decode_text(ids, after)
                assert own.decode_run(ids, bare) == decoded, (name, text)
                assert own.restores((text, bare), ids) is (decoded == text), (name, text)
                assert read.lossy({(text, bare): ids}) == ({} if decoded == text else {(text, bare): decoded})
                spans = own.spans(text, bare)
                assert [i for i, _, _ in spans] == ids
                assert all(0 <= start <= end <= len(text) for _, start, end in spans), (name, text, spans)
                if decoded == text and not bare:
                    assert "".join(own.texts(ids)) == text, (name, text)


@pytest.mark.parametrize("kind", [*KINDS, "tiny", "unigram pieces"])
def test_both_tokenizers_agree(tokenizers, kind):
    agree(tokenizers[kind], kind, hostile(60))


def test_both_tokenizers_agree_on_published_ones(shared):
    agree(SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model"), "llama2", hostile(100))
    agree(SentencePieceTokenizer(shared / "models/stories260K/tok512.model"), "tok512", hostile(60))
    for version in ("v1", "v3"):
        agree(mistral_tokenizer(version), version, hostile(60))


def test_both_tokenizers_agree_on_the_default_model(embedded):
    agree(load_tokenizer(embedded), "smollm2", hostile(200))


def test_golden_words_are_the_papers(shared):
    """Every prompt that the authors published, in the pinned words under Llama-2's role markers."""
    golden = json.loads((shared / "golden/ptst_prompt_templates.json").read_text())
    names = {key.removeprefix("gsm:"): key for key in golden if key.startswith("gsm:")}
    assert len(names) == 7
    row = Conversation((Message("user", "%s"), Message("assistant", "A")))
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    for name, key in names.items():
        p = _format(name, tokenizer)
        written = Oracle(p).reference(row)
        (run,) = (run for _, run in written.runs if not run.control)
        assert run.prompt == golden[key], name


def _format(name, tokenizer, chat_format="llama2", family="gsm8k"):
    from ptst.text.chat_formats import CHAT_FORMATS
    from ptst.text.prompt_format import PromptFormat

    return PromptFormat(TEMPLATES[name], FAMILIES[family], CHAT_FORMATS[chat_format], tokenizer)


def test_every_built_in_template_and_family_is_pinned():
    assert WORDINGS.keys() == TEMPLATES.keys()
    assert TASKS.keys() == FAMILIES.keys()
    for name, wording in WORDINGS.items():
        assert {key: getattr(TEMPLATES[name], key) for key in vars(wording)} == vars(wording), name
    for name, t in TASKS.items():
        f = FAMILIES[name]
        assert (t.question, t.cue, t.join, t.system, t.has_wording) == (f.question, f.cue, f.join, f.task, f.has_task)


ROWS = tuple(
    Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)), f"rows.jsonl:{n}")
    for n, texts in enumerate((("a \u4f60?", "b\U0001f600"), ("c", "\n\nd", "e", "<|im_end|> f ")), 1)
)


@pytest.fixture
def prompt_format(tiny_folder):
    return open_prompt_format(tiny_folder, find_template("chat:llama"), "gsm8k")


def found(prompt_format, rows=ROWS) -> set[str]:
    return {f.rule for f in audit(Source("rows", "gsm8k", rows), Setup(prompt_format)).findings if f.level == "error"}


def test_texts_and_authors_are_those_of_the_encoding(prompt_format):
    for row, reference in zip(ROWS, Oracle(prompt_format).references(ROWS), strict=True):
        assert len(reference.texts) == len(reference.authors) == len(reference.ids)
        written = dict.fromkeys(("user", "assistant", "system", "scaffold", "control"), "")
        for text, author in zip(reference.texts, reference.authors, strict=True):
            written[author] += text
        assert written["user"].split() == "".join(m.content for m in row.messages if m.role == "user").split()
        assert written["assistant"] == "".join(m.content for m in row.messages if m.role == "assistant")
        assert "".join(reference.texts) == prompt_format.tokenizer.decode(reference.ids)
        assert reference.ids[: reference.prompt_length] == prompt_format.encode(row.prompt()).ids
        assert "Question:" in written["scaffold"]
        assert written["system"] == TEMPLATES["chat:llama"].system


def test_a_row_that_cannot_be_encoded_is_refused_alone(prompt_format):
    rows = (ROWS[0], Conversation((Message("user", "\ud800"), Message("assistant", "b")), "r:2"), ROWS[1])
    references = Oracle(prompt_format).references(rows)
    assert [isinstance(r, UserError) for r in references] == [False, True, False]
    assert "lone surrogate, U+D800 at character" in str(references[1])


def test_nothing_is_found_without_a_fault(prompt_format):
    assert [*check_tokenizer(Setup(prompt_format), ROWS)] == []
    assert found(prompt_format, (ROWS[0],)) == set()


def spoiled(prompt_format, **changes):
    """The prompt format with a tokenizer of which attributes are others."""
    tokenizer = copy(prompt_format.tokenizer)
    for name in ("control_names", "_known"):
        tokenizer.__dict__.pop(name, None)
    for name, value in changes.items():
        setattr(tokenizer, name, value(getattr(prompt_format.tokenizer, name)))
    return replace(prompt_format, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        (  # two ids are swapped
            {"_ids_all": lambda f: lambda ts: [[i ^ (i in (68, 69)) for i in ids] for ids in f(ts)]},
            {"text-differs", "message-differs", "template-differs", "system-prompt", "unnatural-ids"},
        ),
        ({"_control": lambda c: {n: i for n, i in c.items() if n != "<|endoftext|>"}}, {"tokenizer"}),
        ({"_control": lambda c: {**c, "the": 262}}, {"tokenizer"}),
        ({"_decode": lambda f: lambda ids: f(ids).replace("b", "")}, {"tokenizer"}),
        ({"decode": lambda f: lambda ids, after=None: f(ids, after).strip()}, {"tokenizer"}),
        ({"bos": lambda _: None}, {"tokenizer"}),
        ({"opening": lambda _: ("<|im_start|>",)}, {"tokenizer"}),
        ({"rstrip": lambda _: frozenset({"<|im_end|>"})}, {"tokenizer"}),
    ],
)
def test_a_spoiled_tokenizer_is_found(prompt_format, changes, rules):
    assert found(spoiled(prompt_format, **changes), (ROWS[0],)) & rules


def test_wrong_stop_ids_are_found(prompt_format, tiny_folder):
    assert prompt_format.stop_ids == {0, 2}  # of generation_config.json and the tokenizer
    (finding,) = check_tokenizer(Setup(replace(prompt_format, eos_ids=frozenset({2}))), ROWS)
    assert (finding.rule, finding.expected, finding.seen) == (
        "stop-ids",
        "0 <|endoftext|>, 2 <|im_end|>",
        "2 <|im_end|>",
    )
    wrong = replace(prompt_format.chat_format, terminator="<|endoftext|>")
    assert "stop-ids" in {f.rule for f in check_tokenizer(Setup(replace(prompt_format, chat_format=wrong)), ROWS)}


@pytest.mark.parametrize("template", ["chat:alpaca", "chat:self-reminder", "chat:in-context-defense", "text:alpaca"])
def test_a_wrong_word_in_a_built_in_template_is_found(prompt_format, template):
    good = TEMPLATES[template]
    words = {"user": f"{good.user}."}
    bad = replace(good, **({"demonstration": (good.demonstration[0], "No.")} if good.demonstration else words))
    right, wrong = (replace(prompt_format, template=t) for t in (good, bad))
    row = ROWS[0]
    for p, faulty in ((right, False), (wrong, True)):
        findings = check_documents(to_batch([replace(p.encode(row), row=0)]), [row], Setup(p))
        assert any(f.level == "error" for f in findings) is faulty


def test_a_users_own_template_is_read_again_from_its_file(prompt_format, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('name = "chat:own"\nuser = "Q: {x}"\nsystem = "model-default"\n')
    template = replace(load_template(path), system="You are a test")  # as the tiny model's chat template inserts
    for read, faulty in ((template, False), (replace(template, user="Q:  {x}"), True)):
        p = replace(prompt_format, template=read)
        batch = to_batch([replace(p.encode(ROWS[0]), row=0)])
        findings = check_documents(batch, ROWS, Setup(p, template_file=path))
        assert any(f.level == "error" for f in findings) is faulty


def test_many_rows_at_once_are_the_rows_one_by_one(tokenizers):
    rng = random.Random(7)
    texts = hostile(120)
    rows = [
        Conversation(
            tuple(Message(("user", "assistant")[i % 2], rng.choice(texts)) for i in range(2 * rng.randint(1, 3)))
        )
        for _ in range(60)
    ]
    rows.insert(9, Conversation((Message("user", "\ud800"), Message("assistant", "b")), "r:9"))
    for name, tokenizer in tokenizers.items():
        p = replace(_format("chat:llama", tokenizer, "chatml"), allow_role_markers=True)
        if not tokenizer.has_control("<|im_start|>"):
            p = replace(_format("chat:llama", tokenizer), allow_role_markers=True)
        together = p.encode_all(rows)
        assert [isinstance(found, UserError) for found in together] == [row.source == "r:9" for row in rows]
        for row, one in zip(rows, together, strict=True):
            if not isinstance(one, UserError):
                assert p.encode(row) == one, name
