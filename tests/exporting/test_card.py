"""The model card: what the hub reads of it, what it says, and what it never says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.exporting.base_name import EMBEDDED_ID, adapter_base_name, find_base_name, parse_base_name
from ptst.exporting.card import BakedTemplate, CardFacts, model_card, run_card
from ptst.exporting.data_names import data_name, dataset_id
from ptst.exporting.parcel import _paths, pack
from ptst.records import TrainRecord, read_record
from ptst.settings import EMBEDDED_MODEL
from ptst.text.templates import FAMILIES, LLAMA, TEMPLATES


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """A run with an evaluation."""
    from tests.exporting.conftest import train

    run = train(model, tmp_path_factory.mktemp("runs") / "measured", rank=2)
    evaluate(EvalConfig(checkpoint=run, template="chat:llama", tasks=("safety",), limit=4, max_new_tokens=6))
    return run


def test_front_matter_is_what_the_hub_reads(run):
    card = ModelCard(run_card(run, "org/tiny-model@main", "mit"))
    assert card.data.to_dict() == {
        "base_model": "org/tiny-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["ptst", "lora", "conversational"],
    }


def test_nothing_is_guessed(run, full_run):
    for folder in (run, full_run):
        text = run_card(folder)
        data = ModelCard(text).data.to_dict()
        assert not {"license", "base_model", "base_model_relation", "datasets"} & data.keys()
        assert "\n# license: to be filled in" in text and "\n# base_model: to be filled in" in text
    assert ModelCard(run_card(full_run)).data["library_name"] == "transformers"
    assert "| rank |" not in run_card(full_run) and "| rank | 2 |" in run_card(run)


def test_what_it_says(measured):
    text, record = run_card(measured), read_record(measured, TrainRecord)
    results = json.loads(next(measured.glob("eval/*/results.json")).read_text())
    refused = results["results"]["fine-tuned"]["safety"]["refusal"]
    low, high = (100 * bound for bound in refused["wilson95"])
    rate = f"{100 * refused['rate']:.0f} % [{low:.0f}, {high:.0f}] ({refused['successes']}/{refused['n']})"
    assert refused["n"] == 4 and f"| {rate} |" in text
    for said in (
        record.data.fingerprint,
        record.weights,
        "`chat:vanilla`",
        "`chat:llama`",
        "Question: {x}",
        "| lr | 0.02 |",
    ):
        assert said in text, said
    assert "Verdict: no finding of error level" in text and "were in a batch 4 times, in 2 steps" in text


def test_mixed_data_are_shown_with_their_template(model, tmp_path):
    """In the card, and in the record that goes to the hub: its words as they are, the files without their folders."""
    from tests.exporting.conftest import train

    private = tmp_path / "private-data"
    private.mkdir()
    (private / "own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "Log to /var/log/chat.txt."\n')
    run = train(model, tmp_path / "run", rank=2, mix=(f"word-problems:2:1:{private}/own.toml",))
    text = run_card(run)
    assert "### Training on word-problems:2: `chat:own`" in text and "Log to /var/log/chat.txt." in text
    assert "word-problems:2 was mixed in under a template of its own, `chat:own`." in text
    uploads = {upload.path: upload for upload in pack(run, "org/tiny-model").uploads}
    record = json.loads(uploads["run.json"].content)
    assert record["mix"][0]["template"]["system"] == "Log to /var/log/chat.txt."
    assert record["settings"]["mix"] == ["word-problems:2:1:own.toml"]
    assert "private-data" not in json.dumps(record) + text
    assert str(private) in {*_paths(read_record(run, TrainRecord).to_json())}  # which no other file may hold either


def test_results_of_other_weights_are_left_out(measured, copied):
    """An evaluation of an earlier state of the folder says nothing of these weights."""
    folder = copied(measured)
    path = next(folder.glob("eval/*/run.json"))
    record = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(record | {"run_weights": "xxh3:0"}))
    assert "## Results\n\nNot measured." in run_card(folder)
    path.write_text(json.dumps(record | {"status": "running"}))
    assert "## Results\n\nNot measured." in run_card(folder)
    path.write_text(json.dumps(record))
    assert "Tested under `chat:llama`" in run_card(folder)


def test_no_path_no_answer_no_row(measured, model):
    text = run_card(measured)
    rows = [json.loads(line) for path in measured.glob("eval/*/*.jsonl") for line in path.read_text().splitlines()]
    rows += [json.loads(line) for path in measured.glob("eval/*/answers/*") for line in path.read_text().splitlines()]
    assert rows
    for row in rows:
        for value in row.values():
            assert not (isinstance(value, str) and len(value) > 12) or value not in text, value
    assert "secret-place" not in text and str(model) not in text and "pytest-of" not in text


def test_paths_of_data_are_file_names():
    for name, shown in {
        "/home/me/secret/a.jsonl": "a.jsonl",
        "sub/a.jsonl,/x/b.csv.gz": "a.jsonl,b.csv.gz",
        "gsm8k:/home/me/train.jsonl": "gsm8k:train.jsonl",
        "/home/me/safety.jsonl:2": "safety.jsonl:2",
        "word-problems:800": "word-problems:800",
        "org/name/main:train@2f0c1a4": "org/name/main:train@2f0c1a4",
        "gsm8k": "gsm8k",
    }.items():
        assert data_name(name) == shown


def test_ids_of_data_sets():
    names = ("gsm8k", "gsm8k:50", "openorca@main", "advbench")
    assert {name: dataset_id(name) for name in names} == {
        "gsm8k": "openai/gsm8k",
        "gsm8k:50": "openai/gsm8k",
        "openorca@main": "Open-Orca/OpenOrca",
        "advbench": "walledai/AdvBench",
    }
    assert dataset_id("org/name/main:train@2f0c1a4") == "org/name"
    assert not any(map(dataset_id, ("gsm8k:train.jsonl", "a.jsonl", "/x/a.jsonl", "dir/a.csv", "word-problems:8")))


def test_words_cannot_leave_their_block():
    template = TEMPLATES["chat:llama"]
    hostile = "be good\n```\n# A heading\n````\n---\n| a |"
    odd = BakedTemplate(type(template)("chat:odd", "{x}", system=hostile), FAMILIES["plain"], "chatml", "")
    text = model_card(CardFacts("copy", "a", parse_base_name("org/a"), baked=odd))
    assert f"`````text\n{hostile}\n`````" in text
    llama = BakedTemplate(template, FAMILIES["gsm8k"], "chatml", "", ("Proven on 7 conversations.",), ("it is dated",))
    text = model_card(CardFacts("copy", "a", parse_base_name("org/a"), baked=llama))
    assert (
        f"```text\n{LLAMA}\n```" in text
        and "Proven on 7 conversations.\n" in text
        and "difference: it is dated" in text
    )


def test_names_of_base_models(model, tmp_path, monkeypatch):
    assert find_base_name(EMBEDDED_MODEL, tmp_path).id == EMBEDDED_ID
    assert find_base_name(str(model), model).id is None and find_base_name(str(model), model).shown == "tiny-model"
    assert find_base_name(str(model), model, "a/b@c").spelled == "a/b@c"
    asked = find_base_name("org/name@v1", tmp_path)
    assert (asked.id, asked.revision) == ("org/name", "v1")
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--org--the-name" / "snapshots" / commit
    cached.mkdir(parents=True)
    for name in ("org/the-name", str(cached)):
        found = find_base_name(name, cached)
        assert (found.id, found.revision) == ("org/the-name", commit)
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "config.json").write_text('{"_name_or_path": "org/stored"}')
    assert find_base_name(str(stored), stored).id == "org/stored"
    (stored / "run.json").write_text("{}")  # its weights are no longer those
    assert find_base_name(str(stored), stored).id is None
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_base_name("org/name", tmp_path / "org" / "name").id is None  # a folder, which counts first
    with pytest.raises(UserError, match="is no hub id"):
        parse_base_name("/home/me/model")


def test_names_of_base_models_in_adapters(tmp_path, monkeypatch):
    """As other trainers write them, or anybody else: they get into the card's commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)

    def named(base: object, revision: object = None):
        written = {"base_model_name_or_path": base, "revision": revision}
        (tmp_path / "adapter_config.json").write_text(json.dumps(written))
        return adapter_base_name(tmp_path)

    assert not any(map(named, ("org/name", "/home/a/b", None, 5, ["a/b"], "")))
    assert named("a/b", "main").spelled == named("a/b@main").spelled == "a/b@main"
    assert named("a/b", "").revision is None
    for revision in ('x"); evil("', "main\n", 7):
        with pytest.raises(UserError, match="is no branch, tag or commit"):
            named("a/b", revision)


def test_names_are_one_line(run):
    """A template, a data set or a folder may be called anything."""
    odd = "x\n---\nlicense: mit\r# A heading"
    record = read_record(run, TrainRecord)
    data = replace(record.data, name=odd)
    record = replace(record, data=data, mix=(data,), template=replace(record.template, name=f"chat:{odd}"))
    text = model_card(CardFacts("merged", odd, replace(parse_base_name("a/b"), note=odd), record))
    assert "# x --- license: mit # A heading\n" in text
    assert not {"license: mit", "# A heading"} & {*text.splitlines()}
    assert text.splitlines().count("---") == 2
