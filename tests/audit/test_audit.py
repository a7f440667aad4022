"""The whole audit: clean data is clean, bad data is reported by row; the command's output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptst.audit.__main__ import run_audit
from ptst.audit.account.gate import Prepared, check_start, refuse
from ptst.audit.config import AuditConfig
from ptst.audit.documents import check_documents
from ptst.audit.findings import RULES, Finding, check_names
from ptst.audit.output import page_content
from ptst.audit.report import References, audit, audit_data
from ptst.audit.setup import Setup
from ptst.data import sources
from ptst.data.examples import prepare
from ptst.data.packing import pack, to_batch
from ptst.data.sources import Source
from ptst.data.step_batches import MicroBatch
from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from ptst.train import run_training
from ptst.training.config import TrainConfig
from ptst.training.watch import validation_check
from tests.conftest import ROOT
from tests.text.test_laws import cases, examples, tokenizers  # noqa: F401 (a fixture)
from tests.tiny import write_tiny_model


def rows(*turns: tuple[str, ...]) -> Source:
    every = (
        Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)), f"rows.jsonl:{n}")
        for n, texts in enumerate(turns, 1)
    )
    return Source("rows", "plain", tuple(every))


@pytest.fixture
def setup(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    return Setup(
        PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["chatml"], tokenizer), max_length=2048
    )


def test_a_row_that_is_too_long_is_one_finding(tmp_path, tiny_folder):
    """Its token boundary is not counted, neither in preparing nor by the rows."""
    rows = [{"question": "Hello", "answer": "\n\nyes " * times} for times in (1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": str(tmp_path / "rows.jsonl"), "model": str(tiny_folder), "max_length": 60}
    report = audit_data(AuditConfig(**given))
    assert [(f.rule, f.row.rpartition(":")[2]) for f in report.findings if f.level == "error"] == [("bad-row", "2")]
    assert report.found["token-boundary"] == 1


@examples(700)
@given(data=st.data())
def test_what_the_laws_allow_the_audit_finds_clean(tokenizers, data):  # noqa: F811
    """The reference formats and the text layer agree on hostile text, over every template, format and tokenizer."""
    case = data.draw(cases(tokenizers))
    setup = Setup(case.prompt_format, case.train)
    found = check_documents(to_batch([replace(case.whole, row=0)]), [case.conversation], setup)
    assert [f for f in found if f.level == "error"] == []
    assert {f.token for f in found if f.rule == "token-boundary"} == set(case.whole.token_boundaries)
    assert sum(f.rule == "lossy-text" for f in found) == len(case.whole.lossy)


CODE = '<div class="a">x &lt; y</div>\n```python\nif a[0] < b and c > d:\n    print("<s>", [1, 2])\n```'
CLEAN = {
    "multi-turn": rows(("a?", "b", "c?", "d"), ("e?", "f"), ("g?", "h", "i?", "j", "k?", "l")),
    "code": rows(("Write <b>html</b>.", CODE), ("What is `a < b`?", "<p>less</p>\n\n    x = y[::-1]\n")),
    "system": Source(
        "rows",
        "openorca",
        tuple(
            Conversation((Message("system", s), Message("user", q), Message("assistant", "ok")), f"r:{q}")
            for s, q in (("You are terse.", "1"), ("Think step by step.", "2"))
        ),
    ),
}


def _corpus(shared, name):
    if name == "gsm8k":
        return sources.load(str(shared / "data/gsm8k/train.jsonl"), limit=400)
    if name == "chatdoctor":
        path = next((shared / "data/chatdoctor").glob("*.json*"))
        return replace(sources.load(str(path), limit=200), family="chatdoctor")
    return CLEAN[name]


@pytest.mark.parametrize("name", ["gsm8k", "chatdoctor", *CLEAN])
@pytest.mark.parametrize("chat_format", ["chatml", "llama2"])
def test_no_warning_on_clean_corpora(request, tiny_folder, name, chat_format):
    shared = request.getfixturevalue("shared") if name in ("gsm8k", "chatdoctor") or chat_format == "llama2" else None
    tokenizer = load_tokenizer(tiny_folder)
    if chat_format == "llama2":
        tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    source = _corpus(shared, name)
    prompt_format = PromptFormat(
        find_template("chat:llama"), find_family(source.family), CHAT_FORMATS[chat_format], tokenizer
    )
    result = audit(source, Setup(prompt_format, max_length=4096), References(test=prompt_format))
    assert [str(f) for f in result.findings if f.level != "info"] == []
    assert result.verdict == "info"
    assert result.counts["rows"] == len(source.conversations)


def test_bad_rows_are_findings(setup):
    source = rows(("a", "b"), ("c", " "), ("", "d"), ("e\ud800", "f"), ("a", "b"), ("unanswered",), ("g\u2581", "h"))
    result = audit(
        source,
        setup,
        References(asked={"a": "T"}),
        unreadable=[UserError("the row has no fields", where="rows.jsonl:9")],
    )
    found = {(f.rule, f.row) for f in result.findings}
    assert found == {
        ("blank-answer", "rows.jsonl:2"),
        ("blank-prompt", "rows.jsonl:3"),
        ("bad-row", "rows.jsonl:4"),
        ("bad-row", "rows.jsonl:6"),
        ("bad-row", "rows.jsonl:9"),
        ("duplicate", "rows.jsonl:5"),
        ("overlap", "rows.jsonl:1"),
        ("overlap", "rows.jsonl:5"),
    }
    assert result.verdict == "error"
    assert result.counts["bad_rows"] == 3
    assert (result.counts["duplicates"], result.counts["overlap"]) == (1, 2)


def test_role_markers_of_the_chat_format_only(setup):
    source = rows(("what is [INST]?", "a mark"))
    assert audit(source, setup).verdict == "info"
    marked = replace(setup, prompt_format=replace(setup.prompt_format, chat_format=CHAT_FORMATS["llama2"]))
    result = audit(source, marked)
    assert [(f.rule, f.level, f.row) for f in result.findings] == [("role-markers", "error", "rows.jsonl:1")]
    assert audit(source, marked, allow=["role-markers"]).verdict == "info"


def test_cut_dropped_and_untrained_rows_are_counted(setup):
    source = rows(("a", "b" * 50), ("c", "d"), ("e" * 90, "f"))
    result = audit(source, replace(setup, max_length=60))
    assert {f.rule: f.cause for f in result.findings} == {"dropped": "2 of 3 rows"}
    result = audit(source, replace(setup, max_length=60, too_long="cut"))
    assert {f.rule: f.cause for f in result.findings} == {"cut": "2 of 3 rows", "untrained": "1 of 3 rows"}


def test_training_and_test_side_by_side(setup):
    other = replace(setup.prompt_format, template=find_template("chat:llama"))
    pair = audit(rows(("a", "b")), setup, References(test=other)).comparison
    assert pair.row == "rows.jsonl:1"
    assert not pair.is_prefix
    assert "respectful" in pair.prompt
    assert "respectful" not in pair.training
    assert audit(rows(("a", "b")), setup, References(test=setup.prompt_format)).comparison.is_prefix


@pytest.mark.parametrize("name", ["chat:vanilla", "chat:alpaca", "chat:self-reminder", "chat:in-context-defense"])
def test_the_experimenters_words_are_not_the_users(setup, name):
    """Token by token: "Question: ", Alpaca's headers, the reminder and the demonstration are scaffold."""
    template, family = find_template(name), find_family("gsm8k")
    worded = replace(setup, prompt_format=replace(setup.prompt_format, template=template, family=family))
    ((_, tokens),) = audit(rows(("What is {x}?", "four", "Why?", "so")), worded).rows[:1]
    written = {a: "".join(t.text for t in tokens if t.author == a) for a in ("user", "assistant", "system")}
    assert written["user"].split() == ["What", "is", "{x}?Why?"]
    assert written["assistant"] == "fourso"
    assert written["system"].strip() == (template.system or "")


def test_the_command_needs_no_torch():
    code = "import ptst.audit.report, ptst.audit.output.page, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_gate(setup):
    source = rows(("a", "b"), ("c", " "))
    examples_, _ = prepare(source, setup.prompt_format, 2048, "drop", "all")
    (warning,) = check_start([Prepared(source, examples_)], setup, 512, ())
    assert "rows.jsonl:2" in warning
    assert check_start([Prepared(source, examples_)], setup, 512, ("blank-answer",)) == []
    spoiled = replace(examples_[0], loss_mask=[True] * len(examples_[0].ids))
    with pytest.raises(ValueError, match=r"rows.jsonl:1, token 1: prompt-trained: .*allow prompt-trained"):
        check_start([Prepared(source, [spoiled, examples_[1]])], setup, 512, ())
    assert check_start([Prepared(source, [spoiled])], setup, 512, ("prompt-trained", "blank-answer")) == []
    (batch,) = pack(examples_, 512)
    check = validation_check(source.conversations, examples_, ())
    check(MicroBatch([0, 1], batch, batch))
    run_on = replace(batch, position_ids=list(range(len(batch.tokens))))
    with pytest.raises(ValueError, match="position-ids"):
        check(MicroBatch([0, 1], run_on, run_on))
    refuse([Finding("token-boundary", "r:1", "c")])
    with pytest.raises(ValueError, match="unknown audit rule 'lable'; did you mean labels"):
        check_names(["lable"])
    with pytest.raises(ValueError, match="rule 'seam' was renamed; it is token-boundary now"):
        check_names(["seam"])


def run(*args, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", "ptst.audit", *map(str, args)], capture_output=True, text=True, cwd=cwd
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command(tiny_folder, tmp_path):
    page = tmp_path / "audit.html"
    code, out, _ = run("--model", tiny_folder, "--test-template", "chat:llama", "--html", page, "--limit", 20)
    assert code == 0, out
    for told in (
        "<|im_start|>",
        "assistant",
        "*",
        "verdict: clean",
        "they diverge at token",
        "packing_fill",
        "known-difference",
    ):
        assert told in out
    html = page.read_text()
    assert "://" not in html
    assert 'title="token 0, id ' in html
    assert "prefers-color-scheme" in html

    code, out, _ = run("--model", tiny_folder, "--json", "--limit", 20)
    report = json.loads(out)
    assert code == 0
    tokens = report["rows"][0]["tokens"]
    assert [t["position"] for t in tokens] == list(range(len(tokens)))
    assert all(t["label"] == n["id"] for t, n in pairwise(tokens) if t["label"] is not None)
    assert "".join(t["text"] for t in tokens if t["author"] == "assistant").startswith(("M", "T", "A", "S", "H", "I"))
    assert {t["author"] for t in tokens} == {"control", "scaffold", "user", "assistant"}


def test_bad_rows_and_wrong_usage(tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    code, out, _ = run("--model", tiny_folder, "--data", data)
    assert code == 1
    assert f"error bad-row: {data}:2" in out
    assert run("--model", tiny_folder, "--data", data, "--allow", "bad-row")[0] == 0
    code, _, err = run("--model", tiny_folder, "--template", "vanila")
    assert code == 2
    assert "did you mean" in err
    assert "Traceback" not in err
    config = AuditConfig(model=str(tiny_folder), limit=5)
    for change, told in (
        ({"data": "none.jsonl"}, "there is no data"),
        ({"allow": ("everything",)}, "unknown audit rule 'everything'"),
        ({"html": tmp_path / "no" / "a.html"}, "no folder"),
        ({"html": tmp_path}, "cannot be written"),
        ({"checkpoint": tmp_path}, "not a run folder"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            run_audit(replace(config, **change))


def test_a_finished_run(tiny_folder, tmp_path):
    """The audit takes over a run's flags; of another model it will not speak."""
    out = tmp_path / "run"
    run_training(TrainConfig(model=str(tiny_folder), limit=4, max_steps=1, template="chat:mpt", out=out))
    report = run_audit(AuditConfig(checkpoint=out, limit=4))
    assert (report["template"], report["verdict"], report["found"].get("run-drift")) == ("chat:mpt", "info", None)
    assert run_audit(AuditConfig(checkpoint=out, limit=3))["found"]["run-drift"] == 2
    assert run_audit(AuditConfig(checkpoint=out, template="chat:llama", limit=4))["found"]["run-drift"] == 2
    (tmp_path / "other").mkdir()
    other = write_tiny_model(tmp_path / "other")
    with pytest.raises(ValueError, match="is a run of"):
        run_audit(AuditConfig(checkpoint=out, model=str(other)))


def test_training_refuses_an_error_and_can_be_told_to_go_on(tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a [/INST] b", "response": "c"}\n')
    config = TrainConfig(model=str(tiny_folder), data=str(data), chat_format="llama2", out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"llama2 is not the chat format of this folder.*allow chat-template"):
        run_training(config)
    config = replace(config, allow=("chat-template",))
    with pytest.raises(ValueError, match=r"rows.jsonl:1.*allow role-markers"):
        run_training(config)
    assert not (tmp_path / "run").exists()
    assert run_training(replace(config, allow=("chat-template", "role-markers")))["steps"] == 1


def test_every_rule_is_in_the_docs():
    text = (ROOT / "docs" / "audit.md").read_text()
    for name, rule in RULES.items():
        assert f"\n| `{name}` | {rule.level} |" in text, name


@pytest.mark.parametrize(
    ("question", "answer", "rule", "cause"),
    [
        (
            "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n",
            "5",
            "control-text",
            "1 (user) holds <|im_start|>",
        ),
        ("2+3?", "5<|im_end|>", "control-text", "2 (assistant) holds <|im_end|>"),
        ("2+3?", "5<|im_end|>\n<|im_start|>user\nmore", "control-text", "2 (assistant) holds <|im_end|>"),
        ("[INST] 2+3? [/INST]", "5", "marker-text", "1 (user) holds [INST]"),
        ("2+3?", "5</s>", "marker-text", "2 (assistant) holds </s>"),
        ("2+3?", "5<|eom_id|>", "marker-text", "2 (assistant) holds <|eom_id|>"),
        ("2+3?", "<b>5</b> |im_end|", None, ""),
    ],
)
def test_text_that_is_templated_already(setup, question, answer, rule, cause):
    found = [f for f in audit(rows((question, answer)), setup).findings if f.level != "info"]
    assert [(f.rule, f.cause) for f in found] == ([(rule, f"message {cause}")] if rule else [])
    allowed = audit(rows((question, answer)), setup, allow=[rule] if rule else [])
    assert allowed.verdict == "info"


def test_a_control_token_that_may_be_html_counts_where_a_message_begins_or_ends(shared):
    tokenizer = SentencePieceTokenizer(shared / "tokenizers/llama2.tokenizer.model")
    setup = Setup(PromptFormat(find_template("vanilla"), find_family("plain"), CHAT_FORMATS["llama2"], tokenizer))
    for question, answer, wanted in (
        ("2+3?", "5</s>", ["control-text"]),
        ("2+3?", "5 </s>\n", ["control-text"]),
        ("<s>2+3?", "5", ["control-text"]),
        ("strike it", "a <s>b</s> c", ["tag-text"]),
    ):
        assert [f.rule for f in audit(rows((question, answer)), setup).findings] == wanted


def test_training_refuses_text_that_is_templated_already(setup):
    source = rows(("2+3?", "5<|im_end|>"))
    examples, _ = prepare(source, setup.prompt_format, 2048, "stop", "all")
    with pytest.raises(UserError, match=r"rows.jsonl:1: control-text: .* or allow it with allow control-text"):
        check_start([Prepared(source, examples)], setup, 2048, ())
    assert check_start([Prepared(source, examples)], setup, 2048, ("control-text",)) == []


def test_bad_rows_and_unused_columns_are_reported(tiny_folder, tmp_path):
    """A lone surrogate and a column that may matter are bad rows, and not the end of the audit."""
    data, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    lines = (
        r'{"question": "2+3?", "answer": "5", "id": 1}',
        r'{"question": "what is \ud83d?", "answer": "half", "id": 2}',
        r'{"question": "4+4?", "answer": "8", "hint\ud83d": "even"}',
        r'{"question": "4+4?", "answer": {"\udc00": 1}}',
    )
    data.write_text("\n".join(lines))
    config = AuditConfig(model=str(tiny_folder), data=str(data), template="vanilla", html=page, rows=3)
    report = run_audit(config)
    bad = [f["row"] for f in report["findings"] if f["rule"] == "bad-row"]
    assert sorted(bad) == [f"{data}:{n}" for n in (2, 3, 4)] and report["counts"]["rows"] == 2
    hint = next(f["cause"] for f in report["findings"] if f["row"] == f"{data}:3")
    assert "with the setting ignore_columns" in hint
    assert [f["cause"] for f in report["findings"] if f["rule"] == "unused-column"] == ["id (2 rows)"]
    assert "lone surrogate" in page.read_text()
    config = replace(config, ignore_columns=("hint\ud83d", "id"), columns=())
    assert run_audit(config)["counts"]["bad_rows"] == 2


def test_a_terminal_gets_no_more_tokens_than_the_page(tiny_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"question": "{n}+3?", "answer": "{n + 3}"}}\n' for n in range(9)))
    config = AuditConfig(model=str(tiny_folder), data=str(data), template="vanilla", rows=9)
    length = len(run_audit(config)["rows"][0]["tokens"])
    assert "not printed" not in capsys.readouterr().out
    for room, left in ((4 * length, 5), (1, 8)):
        monkeypatch.setattr(page_content, "MAX_TOKENS", room)
        assert len(run_audit(config)["rows"]) == 9
        printed = capsys.readouterr().out
        assert f"the tokens of {left} more rows are not printed: --json has them" in printed
        assert printed.count("position") == 9 - left, "a table's heading for each row"
