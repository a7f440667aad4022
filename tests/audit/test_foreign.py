"""`ptst audit --batches`: the known bugs planted in batches of other trainers are found at their row and token; right
batches of any layout are clean; mistakes are one sentence."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from markupsafe import escape

from ptst.audit.__main__ import main, run_audit
from ptst.audit.batches.audit import audit_batches
from ptst.audit.config import AuditConfig
from ptst.data.packing import to_batch
from ptst.errors import UserError
from ptst.text.tokenizer import JsonTokenizer
from tests.audit import faults
from tests.audit import foreign_files as files
from tests.tiny import CHAT_TEMPLATE

ELSEWHERE = {27, 29, 30}  # what no batch shows: how losses and gradients are added up
OWN = {28, 31, 34}  # planted here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizers(folder):
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours, raw = (JsonTokenizer(folder / "tokenizer.json", settings) for _ in range(2))
    raw._tok.encode_special_tokens, raw._kept_out = False, frozenset()
    return ours, raw


def audited(tmp_path, folder, bench, arrays, messages=True, **settings):
    np.savez(tmp_path / "b.npz", **arrays)
    rows = str(files.write_messages(tmp_path / "rows.jsonl", bench)) if messages else None
    template = bench.setup.prompt_format.template
    if not template.is_text:
        settings.setdefault("chat_format", bench.setup.prompt_format.chat_format.name)
    given = {"template": template.name, "max_length": bench.setup.max_length} | settings
    return audit_batches(AuditConfig(batches=tmp_path / "b.npz", model=str(folder), messages=rows, **given))


def wrong(report):
    return [str(f) for f in report.findings if f.level != "info"]


def planted(bench, fault, layout):
    """(the batch, the document's number, token)"""
    batch, row, token = fault.plant(bench)
    documents = files.parts(bench, batch)
    number, arrays = list(documents).index(row), getattr(files, layout)(list(documents.values()))
    if fault.name == "documents_are_not_parted":
        arrays = arrays | {"cu_seqlens": np.delete(arrays["cu_seqlens"], 1)}
        del arrays["position_ids"]
    if fault.name == "positions_run_on_through_the_pack":
        arrays = arrays | {"position_ids": np.arange(arrays["input_ids"].size)[None]}
    return arrays, number, token + (fault.rule == "labels")  # labels are in the place of their tokens here


def where(layout, number):
    return f"b.npz:{number + 1}" if layout == "padded" else f"b.npz:1, document {number}"


PACKS_ONLY = (25,)
CASES = [(f, "packed" if i % 2 or f.number in PACKS_ONLY else "padded") for i, f in enumerate(faults.FAULTS)]


@pytest.mark.parametrize(("fault", "layout"), CASES, ids=lambda x: f"{x.number}-{x.name}" if x in faults.FAULTS else x)
def test_known_bugs_are_found(tmp_path, folder, tokenizers, fault, layout):
    bench = faults.bench(*tokenizers, fault.chat_format, fault.template, **fault.asked)
    arrays, number, token = planted(bench, fault, layout)
    report = audited(tmp_path, folder, bench, arrays)
    found = {(f.row.partition(" (")[0], f.token) for f in report.findings if f.level == "error"}
    assert (where(layout, number), token) in found, wrong(report)


@pytest.fixture
def bench(tokenizers):
    return faults.bench(*tokenizers, "chatml")


def good(bench):
    return [files.aligned(to_batch([bench.good(row)])) for row in range(len(bench.rows))]


def test_bug_28_the_last_batch_is_dropped(tmp_path, folder, bench):
    report = audited(tmp_path, folder, bench, files.padded(good(bench)[:6]))
    (found,) = report.findings
    assert (found.rule, found.row) == ("row-missing", f"{tmp_path}/rows.jsonl:7")
    assert "rows.jsonl:8 (2 rows)" in found.cause


def test_bug_31_tokens_of_another_template(tmp_path, folder, tokenizers, bench):
    other = faults.bench(*tokenizers, "chatml", "chat:llama-short")
    rows = good(bench)
    rows[2] = good(other)[2]
    report = audited(tmp_path, folder, bench, files.padded(rows))
    assert {f.row.partition(" (")[0] for f in report.findings if f.level == "error"} == {"b.npz:3"}


def test_bug_34_padding_beyond_the_embedding(tmp_path, folder, bench):
    batch = files.padded(good(bench))
    batch["input_ids"][batch["attention_mask"] == 0] = 300
    report = audited(tmp_path, folder, bench, batch)
    assert {f.rule for f in report.findings} == {"token-ids"}
    assert (report.findings[0].row, report.findings[0].token) == ("b.npz:1", len(good(bench)[0][0]))


@pytest.mark.parametrize("messages", [True, False], ids=["messages", "alone"])
@pytest.mark.parametrize("chat_format", ["chatml", "llama2"])
def test_bug_18_the_ids_are_the_labels(tmp_path, folder, tokenizers, chat_format, messages):
    bench = faults.bench(*tokenizers, chat_format)
    rows = good(bench)
    rows[2] = rows[2][1], rows[2][1]
    report = audited(tmp_path, folder, bench, files.padded(rows), messages)
    assert [(f.row, f.token) for f in report.findings if f.rule == "token-ids"] == [("b.npz:3", 0)]
    assert {f.row.partition(" (")[0] for f in report.findings if f.level == "error"} == {"b.npz:3"}


def test_at_least_30_of_34_are_planted():
    assert {f.number for f in faults.FAULTS} | OWN == set(range(1, 35)) - ELSEWHERE


def seen_without_messages(tmp_path, folder, tokenizers, fault):
    bench = faults.bench(*tokenizers, fault.chat_format, fault.template, **fault.asked)
    layout = "packed" if fault.number in PACKS_ONLY else "padded"
    arrays, number, _ = planted(bench, fault, layout)
    report = audited(tmp_path, folder, bench, arrays, messages=False)
    return where(layout, number) in {f.row for f in report.findings if f.level != "info"}


def test_most_are_found_without_messages(tmp_path, folder, tokenizers):
    """At their row. What the messages were is not known then: five cannot be seen."""
    chosen = {f.number: f for f in faults.FAULTS}.values()  # the second of each
    missed = {f.number for f in chosen if not seen_without_messages(tmp_path, folder, tokenizers, f)}
    assert missed <= {11, 16, 20, 33}, missed


def shifted(batch):
    labels = np.roll(batch["labels"], -1, axis=1)
    labels[:, -1] = -100
    return batch | {"labels": labels}


def without(batch, key):
    return {name: array for name, array in batch.items() if name != key}


LAYOUTS = {
    "padded": files.padded,
    "padded, shifted": lambda rows: shifted(files.padded(rows)),
    "padded, no attention mask": lambda rows: without(files.padded(rows), "attention_mask"),
    "packed": files.packed,
    "packed, shifted": lambda rows: shifted(files.packed(rows)),
    "packed, positions": lambda rows: without(files.packed(rows), "cu_seqlens"),
    "packed, another order": lambda rows: files.packed(rows[::-1]),
}


@pytest.mark.parametrize("messages", [True, False], ids=["messages", "alone"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chat_format", ["chatml", "llama2", "mistral-v1"])
def test_right_batches_are_clean(tmp_path, folder, tokenizers, chat_format, layout, messages):
    bench = faults.bench(*tokenizers, chat_format)
    report = audited(tmp_path, folder, bench, LAYOUTS[layout](good(bench)), messages)
    assert wrong(report) == []
    assert report.counts["documents"] == 8
    assert report.verdict == "info"


def with_newlines(bench):
    """The line break behind every terminator is trained, too, as some trainers do."""
    out = []
    for ids, labels in good(bench):
        more = [i for i in range(1, len(ids)) if labels[i - 1] == bench.eos]
        out.append((ids, [ids[i] if i in more else label for i, label in enumerate(labels)]))
    return out


def last_answers(bench):
    out = []
    for ids, labels in good(bench):
        start = max(i for i in range(1, len(ids)) if labels[i] >= 0 and labels[i - 1] < 0)
        out.append((ids, [-100] * start + labels[start:]))
    return out


def last_answers_with_newlines(bench):
    """As a completion that is all that a template adds to the prompt."""
    whole = zip(last_answers(bench), with_newlines(bench), strict=True)
    return [(ids, [*last[:-1], more[-1]]) for (ids, last), (_, more) in whole]


def without_the_last_newline(bench):
    return [(ids[:-1], labels[:-1]) for ids, labels in good(bench)]


@pytest.mark.parametrize("messages", [True, False], ids=["messages", "alone"])
@pytest.mark.parametrize(
    ("choice", "note"),
    [(with_newlines, "tail-trained"), (last_answers, "left-out-answers"), (without_the_last_newline, None)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_choices_of_trainers_are_notes(tmp_path, folder, bench, choice, note, messages):
    report = audited(tmp_path, folder, bench, files.padded(choice(bench)), messages)
    assert wrong(report) == []
    assert note is None or note in report.found


@pytest.mark.parametrize("messages", [True, False], ids=["messages", "alone"])
def test_a_fault_of_one_row_leaves_the_choice_of_all_a_note(tmp_path, folder, bench, messages):
    rows = with_newlines(bench)
    rows[2] = rows[2][0], [-100] * len(rows[2][0])
    ids, labels = rows[4]
    first = next(i for i, label in enumerate(labels) if label >= 0)
    rows[4] = ids, [*labels[: first - 1], ids[first - 1], *labels[first:]]
    report = audited(tmp_path, folder, bench, files.padded(rows), messages)
    found = {(f.rule, f.row.partition(" (")[0]) for f in report.findings if f.level != "info"}
    assert found == {("nothing-trained", "b.npz:3"), ("prompt-trained", "b.npz:5")}
    assert report.found["tail-trained"] == 1


def test_two_choices_at_once_are_notes(tmp_path, folder, bench):
    report = audited(tmp_path, folder, bench, files.padded(last_answers_with_newlines(bench)))
    assert wrong(report) == []
    assert {"tail-trained", "left-out-answers"} <= report.found.keys()


def test_what_one_document_does_alone_is_no_choice(tmp_path, folder, bench):
    for choice, rule in ((with_newlines, "prompt-trained"), (last_answers, "answer-untrained")):
        rows = good(bench)
        rows[faults.MULTI] = choice(bench)[faults.MULTI]
        report = audited(tmp_path, folder, bench, files.padded(rows))
        assert {f.rule for f in report.findings if f.level == "error"} == {rule}
    report = audited(tmp_path, folder, bench, files.padded(last_answers(bench)), train_on="all")
    assert set(report.found) == {"answer-untrained"}


def test_rows_cut_at_one_length_are_a_note(tmp_path, folder, bench):
    rows = [(ids[:50], labels[:50]) for ids, labels in good(bench)]
    report = audited(tmp_path, folder, bench, files.padded(rows))
    assert wrong(report) == [] and "cut" in report.found
    rows[0] = (rows[0][0][:40], rows[0][1][:40])
    report = audited(tmp_path, folder, bench, files.padded(rows))
    assert "cut-short" in report.found


def test_the_folders_own_template_is_right(tmp_path, bench):
    """It inserts a default system prompt, which our format does not."""
    folder = files.write_folder(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    ids = bench.tokenizer.encode("system\nYou are a test")
    start, end = bench.tokenizer.control_id("<|im_start|>"), bench.tokenizer.control_id("<|im_end|>")
    block = [start, *ids, end, *bench.tokenizer.encode("\n")]
    rows = [([*block, *own], [-100] * len(block) + labels) for own, labels in good(bench)]
    report = audited(tmp_path, folder, bench, files.padded(rows), chat_format=None)
    assert wrong(report) == [] and report.found == {"known-difference": 1}
    assert "8 of 8 documents are as the folder's chat template writes them" in report.findings[0].cause
    rows[1] = ([start, *rows[1][0]], [-100, *rows[1][1]])
    report = audited(tmp_path, folder, bench, files.padded(rows), chat_format=None)
    assert [(f.rule, f.row.partition(" (")[0], f.token) for f in report.findings if f.level == "error"] == [
        ("double-bos", "b.npz:2", 1)
    ]


@pytest.mark.parametrize("layout", [files.padded, files.packed])
def test_rows_lost_doubled_and_foreign(tmp_path, folder, bench, layout):
    rows = good(bench)
    ids = bench.tokenizer.encode("something else that nobody of these rows ever said")
    rows[2], rows[4] = rows[5], (ids, [-100] * 10 + ids[10:])
    report = audited(tmp_path, folder, bench, layout(rows))
    sources = {f.rule: f.row for f in report.findings if f.level == "error"}
    assert sources["row-repeated"] == f"{tmp_path}/rows.jsonl:6"
    missing = [f.row for f in report.findings if f.rule == "row-missing"]
    assert missing == [f"{tmp_path}/rows.jsonl:3", f"{tmp_path}/rows.jsonl:5"]
    assert sources["unknown-document"] == where(layout.__name__, 4)


def test_answers_exchanged_between_rows(tmp_path, folder, bench):
    start = [bench.start(row) for row in (faults.SINGLE, faults.EDGES)]
    rows = good(bench)
    one, other = rows[faults.SINGLE], rows[faults.EDGES]
    rows[faults.SINGLE] = tuple(a[: start[0]] + b[start[1] :] for a, b in zip(one, other, strict=True))
    rows[faults.EDGES] = tuple(b[: start[1]] + a[start[0] :] for a, b in zip(one, other, strict=True))
    report = audited(tmp_path, folder, bench, files.padded(rows))
    found = {(f.rule, f.row.partition(" (")[0], f.token) for f in report.findings if f.level == "error"}
    assert found == {("row-exchanged", "b.npz:1", start[0]), ("row-exchanged", "b.npz:5", start[1])}


def test_a_row_of_documents_that_nothing_parts(tmp_path, folder, bench):
    documents = good(bench)
    flat = {name: np.concatenate([d[i] for d in documents])[None] for i, name in enumerate(("input_ids", "labels"))}
    report = audited(tmp_path, folder, bench, flat)
    found = [f for f in report.findings if f.rule == "boundaries"]
    assert [(f.row, f.token) for f in found] == [("b.npz:1", len(documents[0][0]))]
    chopped = {name: array[0, : array.size // 40 * 40].reshape(-1, 40) for name, array in flat.items()}
    report = audited(tmp_path, folder, bench, chopped)
    assert {f.row.partition(",")[0].partition(" (")[0] for f in report.findings if f.level == "error"} >= {
        f"b.npz:{i}" for i in range(2, 9)
    }


def test_the_report(tmp_path, folder, bench):
    report = audited(tmp_path, folder, bench, files.packed(good(bench)))
    value = json.loads(json.dumps(report.to_json()))
    assert value["counts"]["messages"] == value["counts"]["documents_matched"] == 8
    assert "aligned" in value["counts"]["labels"] and "cu_seqlens" in value["counts"]["layout"]
    assert "order" in value["not_checked"]
    (shown,) = value["rows"]
    tokens = shown["tokens"]
    assert shown["row"] == "b.npz:1, document 0"
    said = {author: "".join(t["text"] for t in tokens if t["author"] == author) for author in ("user", "assistant")}
    assert said["user"] == faults.TURNS[0][0] and said["assistant"].strip() == faults.TURNS[0][1]
    assert "".join(t["text"] for t in tokens if t["trained"]) == f"{faults.TURNS[0][1]}<|im_end|>"
    alone = audited(tmp_path, folder, bench, files.packed(good(bench)), messages=False)
    assert {"row-missing", "text-differs"} <= set(alone.not_checked)
    no_roles = audited(tmp_path, folder, bench, files.packed(good(bench)), messages=False, chat_format="llama2")
    assert "no document has the role markers of the chat format llama2" in no_roles.not_checked["roles"]


def test_the_page(tmp_path, folder, bench):
    arrays = files.padded(good(bench))
    arrays["labels"][0, np.flatnonzero(arrays["labels"][0] >= 0)[-1]] = -100  # the terminator
    np.savez(tmp_path / "b.npz", **arrays)
    messages, page = files.write_messages(tmp_path / "rows.jsonl", bench), tmp_path / "page.html"
    given = {"chat_format": "chatml", "html": page, "messages": str(messages)}
    report = run_audit(AuditConfig(batches=tmp_path / "b.npz", model=str(folder), **given))
    html = page.read_text()
    at = [f["token"] for f in report["findings"] if f["row"].startswith("b.npz:1") and f["token"] is not None]
    assert at and all(f'href="#d0-t{token}"' in html for token in at)  # also where the place names the message, too
    assert hashlib.sha256((tmp_path / "b.npz").read_bytes()).hexdigest() in html
    given["messages"] = None
    report = run_audit(AuditConfig(batches=tmp_path / "b.npz", model=str(folder), **given))
    assert report["not_checked"].items() and all(
        escape(why) in page.read_text() for why in report["not_checked"].values()
    )


def test_exit_codes(tmp_path, folder, bench, monkeypatch, capsys):
    def code(*more):
        monkeypatch.setattr(sys, "argv", ["audit", *given, *more])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    messages = files.write_messages(tmp_path / "rows.jsonl", bench)
    path = tmp_path / "b.npz"
    given = ["--batches", str(path), "--model", str(folder), "--messages", str(messages), "--chat-format", "chatml"]
    np.savez(path, **files.padded(good(bench)))
    assert code() == 0 and "verdict: clean" in capsys.readouterr().out
    np.savez(path, **files.padded(good(bench)[:6]))
    assert code() == 1 and "error row-missing" in capsys.readouterr().out
    assert code("--allow", "row-missing") == 0
    np.savez(path, **files.padded(good(bench)[::-1]))
    assert code("--labels", "aligned") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the messages are in another order; give them in the order of the rows" in told


def other_ids(rows):
    return [
        ([(7 * i + 11) % 250 + 3 for i in ids], [(7 * i + 11) % 250 + 3 if i >= 0 else i for i in own])
        for ids, own in rows
    ]


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (lambda rows: rows, {"messages": False, "labels": "shifted", "batches": None}, "is of batches"),
        (lambda rows: rows, {"model": None}, "batches needs the model"),
        (lambda rows: rows, {"data": "x.jsonl"}, "data has no effect on batches"),
        (lambda rows: rows[::-1], {}, "rows.jsonl:7: the messages are in another order"),
        (other_ids, {}, "8 of 8 documents are none of the 8 messages"),
        (
            lambda rows: [([i + 300 for i in ids], [max(i + 300, -100) for i in own]) for ids, own in rows],
            {},
            "ids go up to",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, folder, bench, change, settings, words):
    np.savez(tmp_path / "b.npz", **files.padded(change(good(bench))))
    given = {"batches": tmp_path / "b.npz", "model": str(folder), "chat_format": "chatml"}
    given["messages"] = str(files.write_messages(tmp_path / "rows.jsonl", bench))
    given = {key: value if value is not False else None for key, value in (given | settings).items()}
    with pytest.raises(UserError) as error:
        run_audit(AuditConfig(**given))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_empty_system_prompt_is_a_mistake(tmp_path, folder, bench):
    np.savez(tmp_path / "b.npz", **files.padded(good(bench)))
    messages = [{"role": "system", "content": " "}, *bench.rows[0].to_json()]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config = AuditConfig(batches=tmp_path / "b.npz", model=str(folder), messages=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the system prompt is empty"):
        run_audit(config)
