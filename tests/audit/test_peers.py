"""benchmarks/who_trains_what.py: what it reads off batches, and the audit on the batches of real libraries."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.folders import CHATML, write_folder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MARKS = ("<|im_start|>", "<|im_end|>")
QUESTION, ANSWER = "What is 1 + 1?", "It is 2."
ROW = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SPELLED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("peers.facts"), importlib.import_module("peers.report")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chatml"), CHATML, MARKS)


@pytest.fixture(scope="module")
def encode(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def labeled(encode, *pieces: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces of text, each trained or not."""
    ids, labels = [], []
    for text, trained in pieces:
        own = encode(text)
        ids += own
        labels += own if trained else [-100] * len(own)
    return ids, labels


HEAD = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def measured(peers, folder, tmp_path, batch: dict, rows=(ROW,), own=None) -> dict:
    facts, report = peers
    file = tmp_path / "batches.jsonl"
    file.write_text(json.dumps(batch) + "\n")
    return report.measure(file, list(rows), facts.Speller(folder), own, cut=False)


def test_parts_of_a_conversation_are_told(peers, folder, encode, tmp_path):
    ids, labels = labeled(encode, (HEAD, False), (ANSWER, True), ("<|im_end|>", True), ("\n", False))
    made = measured(peers, folder, tmp_path, {"input_ids": [ids], "labels": [labels]}, own=[encode(SPELLED)])
    tokens = made["tokens"]
    assert tokens["answer"] == [len(encode(ANSWER))] * 2
    assert tokens["end"] == [1, 1] and tokens["after"] == [0, 1]
    assert tokens["user"][0] == tokens["header"][0] == tokens["open"][0] == 0
    assert made["template_ids"] == [1, 1] and "rows_absent" not in made


def test_labels_on_header_and_not_on_the_end_are_told(peers, folder, encode, tmp_path):
    question = f"<|im_start|>user\n{QUESTION}<|im_end|>\n"
    pieces = (question, False), ("<|im_start|>assistant\n", True), (ANSWER, True), ("<|im_end|>\n", False)
    ids, labels = labeled(encode, *pieces)
    made = measured(peers, folder, tmp_path, {"input_ids": [ids], "labels": [labels]})
    assert made["tokens"]["header"][0] == len(encode("<|im_start|>assistant\n"))
    assert made["tokens"]["end"] == [0, 1]
    assert made["sample"]["header"].startswith("<|im_start|>|a")


def test_documents_are_divided_by_what_the_batch_has(peers, encode):
    facts, _ = peers
    ids, labels = labeled(encode, (HEAD, False), (ANSWER + "<|im_end|>\n", True))
    n = len(ids)
    packed = {"input_ids": [ids * 2], "labels": [labels * 2]}
    ways = (
        {"position_ids": [[*range(n)] * 2]},
        {"cu_seq_lens_q": [0, n, 2 * n]},
        {"seq_lens": [[n, n]]},
        {"attention_mask": [[1] * n + [2] * n]},
    )
    for way in ways:
        found = list(facts.documents(packed | way))
        assert [d.ids for d in found] == [ids, ids], way
    assert len(list(facts.documents(packed))) == 1
    padded = {"input_ids": [ids, [*ids[:-4], 5, 5, 5, 5]], "labels": [labels, [*labels[:-4], *[-100] * 4]]}
    assert [len(d.ids) for d in facts.documents(padded)] == [n, n - 4]


def test_padding_that_counts_as_tokens_is_no_document(peers, encode):
    facts, _ = peers
    ids, labels = labeled(encode, (HEAD, False), (ANSWER + "<|im_end|>\n", True))
    row = {"input_ids": [[*ids, 7, 7, 7]], "labels": [[*labels, *[-100] * 3]], "attention_mask": [[1] * (len(ids) + 3)]}
    row["position_ids"] = [[*range(len(ids)), 0, 0, 0]]
    assert [d.ids for d in facts.documents(row)] == [ids]


@pytest.mark.parametrize(("answer", "stripped"), [(ANSWER, 0), (f"\n\n{ANSWER}", 0), (f"  {ANSWER}", 1)])
def test_outer_whitespace_that_is_gone_is_counted(peers, folder, encode, tmp_path, answer, stripped):
    """First line breaks may be the header's: nothing is said of them."""
    ids, labels = labeled(encode, (HEAD, False), (ANSWER + "<|im_end|>", True), ("\n", False))
    row = [ROW[0], {"role": "assistant", "content": answer}]
    made = measured(peers, folder, tmp_path, {"input_ids": [ids], "labels": [labels]}, rows=(row,))
    assert made["seen"].get("stripped", 0) == stripped
    assert made["tokens"]["answer"] == [len(encode(ANSWER))] * 2


def test_double_bos_joined_rows_and_cut_answers_are_counted(peers, folder, encode, tmp_path):
    ids, labels = labeled(encode, ("<s><s>" + HEAD, False), (ANSWER[:5], True))
    other = [{"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "It is four."}]
    made = measured(peers, folder, tmp_path, {"input_ids": [ids], "labels": [labels]}, rows=(ROW, other))
    assert made["seen"]["double_bos"] == 1 and made["rows_absent"] == [1]
    assert made["seen"]["ends_without_end"] == 1
    both = encode(SPELLED + SPELLED.replace(QUESTION, "And 2 + 2?").replace(ANSWER, "It is four."))
    made = measured(peers, folder, tmp_path, {"input_ids": [both], "labels": [both]}, rows=(ROW, other))
    assert made["seen"]["joined"] == 1 and made["tokens"]["end"] == [2, 2]


def test_table_and_facts_say_what_differs(peers, folder, encode, tmp_path):
    _, report = peers
    ids, labels = labeled(encode, (HEAD, False), (ANSWER, True), ("<|im_end|>\n", False))
    made = measured(peers, folder, tmp_path, {"input_ids": [ids], "labels": [labels]}, own=[encode("<s>" + SPELLED)])
    shared = {"peer": "somebody", "versions": {"somebody": "1.2"}, "setting": "plain", "corpus": "single", "rows": 1}
    results = [shared | {"folder": "chatml"} | made, shared | {"folder": "other", "error": "ValueError: no <b>"}]
    said = report.facts(results)
    assert "somebody 1.2, `plain`: raises `ValueError: no <b>` (other; single)." in said
    assert "somebody 1.2, `plain`: labels 0 of 1 of the token that ends an answer: chatml." in said
    assert any(
        "0 of 1 rows have the ids of the folder's template (chatml); in chatml token 0:" in line for line in said
    )
    line = report.table(results).splitlines()[-1]
    assert line.startswith("| somebody, `plain` | all | none | none | none | none |")


def run_peer(peer: str, folder: Path, rows: list, out: Path, settings: set[str]) -> dict[str, Path]:
    """One library in a process of its own: files of batches by setting."""
    job = {"folders": {folder.name: str(folder)}, "corpora": {"single": rows}, "limits": {"single": 512}}
    out.mkdir()
    (out / "job.json").write_text(json.dumps({**job, "out": str(out), "pack_limit": 512}))
    command = [sys.executable, str(BENCHMARKS / "peers" / "run.py"), peer, str(out / "job.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {r["setting"]: out / r["file"] for r in results if r["setting"] in settings and "file" in r}


# The answer and its end are the model's; what follows the end belongs to the next message.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    """A model folder whose template marks what the model generates."""
    from tests.tiny import write_tiny_model

    made = write_tiny_model(tmp_path_factory.mktemp("marked"))
    settings = json.loads((made / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (made / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (made / "chat_template.jinja").write_text(MARKED)
    return made


@pytest.mark.parametrize(
    ("peer", "needs", "settings"),
    [
        ("transformers", ("transformers",), {"assistant_masks"}),
        ("trl", ("trl", "transformers"), {"assistant_only_loss", "bfd_packing"}),
    ],
)
def test_libraries_label_the_answer_and_its_end_where_the_template_marks_them(
    peers, marked, tmp_path, peer, needs, settings
):
    for name in needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name} (pip install -e '.[audit-peers]')")
    facts, report = peers
    rows = [ROW, [*ROW, {"role": "user", "content": "And 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]]
    rows[1][0] = {"role": "user", "content": "What is 1 + 1, again?"}
    files = run_peer(peer, marked, rows, tmp_path / "out", settings)
    assert set(files) == settings
    for file in files.values():
        made = report.measure(file, rows, facts.Speller(marked), None, cut=False)
        tokens = made["tokens"]
        assert tokens["answer"][0] == tokens["answer"][1] and tokens["end"] == [3, 3]
        assert not any(tokens[p][0] for p in ("header", "user", "open", "after")), tokens


CUT = (  # as Qwen3's template writes answers: only their first line breaks are cut, behind a line break of its own
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ (m.content.lstrip('\n') if m.role == 'assistant' else m.content) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_cuts_line_breaks_behind_its_own_is_right(tmp_path):
    from ptst.audit.batches.audit import audit_batches
    from ptst.audit.config import AuditConfig
    from tests.tiny import byte_tokenizer, write_tiny_model

    model = write_tiny_model(tmp_path)
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": CUT}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    encode = byte_tokenizer().encode
    ids, labels = labeled(lambda text: encode(text).ids, (HEAD, False), (ANSWER + "<|im_end|>", True), ("\n", False))
    row = [ROW[0], {"role": "assistant", "content": f"\n\n{ANSWER}"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": [ids], "labels": [labels]}))
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": row}))
    asked = AuditConfig(batches=tmp_path / "b.jsonl", model=str(model), messages=str(tmp_path / "m.jsonl"))
    report = audit_batches(asked)
    assert not [str(f) for f in report.findings if f.level != "info"]


def test_kept_results_are_read_as_they_were(peers, tmp_path):
    script = importlib.import_module("who_trains_what")
    result = {"peer": "trl", "versions": {"trl": "1"}, "setting": "a", "words": "b", "folder": "f", "corpus": "single"}
    results = [result | {"rows": 1, "error": "no"}, result | {"corpus": "turns", "tokens": {"end": [1, 2]}, "seen": {}}]
    (tmp_path / "kept.json").write_text(script.packed(results, [], {"axolotl": "not there"}))
    read = script.unpacked(tmp_path / "kept.json")
    assert read["results"] == results and read["problems"] == {"axolotl": "not there"}
