"""Both commands as a user runs them, on a small random model, and the mistakes a user makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ptst.audit.config import AuditConfig
from ptst.audit.report import audit_data
from ptst.chat import ChatConfig, run_chat
from ptst.errors import UserError
from ptst.eval import run_evaluation
from ptst.evaluation.answers import AnswerFile
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import plan
from ptst.evaluation.rates import Rate
from ptst.evaluation.tasks.table import TASKS
from ptst.evaluation.verdicts import AnswerClass
from ptst.model import weights
from ptst.open import OpenModel, open_model
from ptst.progress import ProgressLine
from ptst.text.chat_template import read_chat_template
from ptst.train import run_training
from ptst.training.config import TrainConfig
from tests.conftest import ROOT
from tests.evaluation.length_task import LENGTH
from tests.tiny import write_tiny_model


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a small model folder in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    return tmp_path


def command(here: Path, name: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", f"ptst.{name}", *flags]
    return subprocess.run(line, cwd=here, capture_output=True, text=True, env=environment, timeout=240)


def test_after_training_a_base_model_its_own_template_is_named(here, capsys):
    """It has no chat format, which `--template chat:llama` would need."""
    rules = here / "model/tokenizer.json"
    rules.write_text(rules.read_text().replace("<|im_start|>", "<|unused0|>").replace("<|im_end|>", "<|unused1|>"))
    (here / "model/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    run_training(
        TrainConfig(model="model", template="text:alpaca", data="word-problems:4", max_steps=1, out=here / "run")
    )
    assert f"--checkpoint {here}/run --template text:alpaca" in "".join(capsys.readouterr().err.split("\n"))


def test_a_chat_format_has_no_use_under_a_text_template(here):
    asked = {"model": "model", "chat_format": "chatml", "template": "text:alpaca"}
    ways = [lambda: run_training(TrainConfig(**asked, data="word-problems:4")), lambda: plan(EvalConfig(**asked))]
    ways += [lambda: run_chat(ChatConfig(**asked)), lambda: audit_data(AuditConfig(**asked))]
    for way in ways:
        with pytest.raises(UserError, match="chat_format chatml has no effect under text:alpaca"):
            way()


def test_train_then_eval(here):
    done = command(here, "train", "--model", "model", "--template", "vanilla", "--max-steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    run = here / result["run"]
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["template"]["name"], record["family"]["name"]) == (
        "finished",
        "chat:vanilla",
        "gsm8k",
    )
    assert record["chat_format"] == "chatml"
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(m["kind"], m["step"]) for m in metrics] == [("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]
    assert [m["validation_loss"] for m in metrics if m["kind"] == "eval"] == [
        result["validation_loss"][k] for k in ("before", "after")
    ]
    assert any(t.abs().sum() > 0 for n, t in load_file(run / "adapter_model.safetensors").items() if "lora_B" in n)
    assert json.loads((run / "adapter_config.json").read_text())["peft_type"] == "LORA"

    done = command(here, "eval", "--template", "chat:llama", "--limit", "8", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert str(run.relative_to(here)) in done.stderr  # neither --checkpoint nor --model: the latest run, named
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1
    assert set(result["results"]) == {"untouched", "fine-tuned"}
    for tasks in result["results"].values():
        assert sum(tasks["safety"][c]["successes"] for c in AnswerClass) == 8
        assert tasks["gsm8k"]["last_number"]["n"] == 8
        assert tasks["nll"]["nats_per_token"] > 0
    answers = [json.loads(x) for x in (here / result["out"] / "untouched.safety.jsonl").read_text().splitlines()]
    assert {"prompt", "answer", "class", "reason", "category", "judge"} <= set(answers[0])
    assert len({a["category"] for a in answers}) == 4
    assert "little safety to lose" in result["remark"]
    assert json.loads((here / result["out"] / "results.json").read_text())["ptst"] is True
    record = json.loads((here / result["out"] / "run.json").read_text())
    assert (record["kind"], record["status"], record["settings"]["limit"]) == ("eval", "finished", 8)
    assert (
        "tasks: gsm8k, safety, over-refusal, nll (the test part of word-problems has worked #### answers)"
        in done.stderr
    )
    assert "PTST: trained under chat:vanilla" in done.stderr


def test_full_fine_tuning_writes_a_model_folder(here, monkeypatch):
    # A base that was made here; its record is not the run's, not even while the weights are being written.
    (here / "model" / "run.json").write_text('{"kind": "align", "status": "finished"}')

    def full(tensors, path, *rest):
        if "model.safetensors" in path.name:
            raise OSError("full")
        save_file(tensors, path, *rest)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(weights, "save_file", full)
        run_training(TrainConfig(model="model", full=True, max_steps=1, lr=1e-3, out=here / "stopped"))
    record = json.loads((here / "stopped" / "run.json").read_text())
    assert (record["kind"], record["status"]) == ("train", "running")
    result = run_training(TrainConfig(model="model", full=True, max_steps=1, lr=1e-3, out=here / "run"))
    assert result["steps"] == 1
    before, after = (load_file(here / f / "model.safetensors") for f in ("model", "run"))
    assert before.keys() == after.keys()
    assert all((before[k] != after[k]).any() for k in before)
    names = [open_model(name).described for name in ("model", str(here / "run"))]  # by their records
    assert names == ["model model (made by ptst.align)", f"run {here / 'run'} (trained under chat:vanilla)"]
    shutil.copytree(here / "run", here / "old")
    (here / "old" / "run.json").write_text('{"kind": "train", "flags": {}}')  # of an earlier version
    assert open_model(str(here / "old")).described == f"model {here / 'old'}"
    evaluated = run_evaluation(EvalConfig(checkpoint=here / "run", tasks=("nll",), limit=3, baseline=False))
    assert set(evaluated["results"]) == {"fine-tuned"}
    untouched = run_evaluation(EvalConfig(model=str(here / "run"), tasks=("nll",), limit=3))
    assert untouched["results"]["untouched"] == evaluated["results"]["fine-tuned"]


def test_full_fine_tuning_keeps_a_chat_template_of_its_own_file(here):
    tokenizer_config = here / "model" / "tokenizer_config.json"
    described = json.loads(tokenizer_config.read_text())
    (here / "model" / "chat_template.jinja").write_text(described.pop("chat_template"))
    tokenizer_config.write_text(json.dumps(described))
    run_training(TrainConfig(model="model", full=True, max_steps=1, out=here / "run"))
    assert read_chat_template(here / "run") == read_chat_template(here / "model") is not None


def test_an_adapter_goes_on_no_other_weights_of_its_shape(here):
    run_training(TrainConfig(model="model", max_steps=1, out=here / "run"))
    write_tiny_model(here / "model", seed=1)
    with pytest.raises(ValueError, match=r"the adapter in .*run was trained on other weights than .*model holds now"):
        run_evaluation(EvalConfig(checkpoint=here / "run", limit=1, max_new_tokens=2))


def test_long_examples_are_dropped_or_cut_and_counted(here):
    base = {"model": "model", "limit": 20, "max_steps": 1, "max_length": 250}
    with pytest.raises(ValueError, match=r"exceed the limit of 250 .* of 20; raise the limit, or set too_long"):
        run_training(TrainConfig(**base, out=here / "a"))
    dropped = run_training(TrainConfig(**base, too_long="drop", out=here / "a"))
    assert dropped["rows"] == 20
    assert 0 < dropped["dropped"] < 20
    assert dropped["examples"] == 20 - dropped["dropped"]
    cut = run_training(TrainConfig(**base, too_long="cut", out=here / "b"))
    assert cut["cut"] == dropped["dropped"]
    assert cut["examples"] + cut["untrained"] == 20


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(here, monkeypatch):
    """Stopped at any answer of any task, it ends with the figures of one that was not."""
    base = {"model": "model", "limit": 3, "max_new_tokens": 4, "temperature": 1.0}
    whole = run_evaluation(EvalConfig(**base, out=here / "whole"))
    out, stopped = here / "out", 0
    add = AnswerFile.add
    for _ in range(20):
        count = 0

        def stop_at_the_third(*args):
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            add(*args)

        monkeypatch.setattr(AnswerFile, "add", stop_at_the_third)
        try:
            resumed = run_evaluation(EvalConfig(**base, batch_size=2, out=out))
            break
        except KeyboardInterrupt:
            stopped += 1
            assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert stopped == 4  # nine answers, two a time
    assert resumed["results"] == whole["results"]
    for task in ("gsm8k", "safety", "over-refusal"):
        name = f"untouched.{task}.jsonl"
        assert (out / name).read_bytes() == (here / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="not an empty folder"):
        run_evaluation(EvalConfig(**base, out=out))
    # Without --out it finds the newest of its kind that is not finished, and nothing else.
    monkeypatch.setattr(AnswerFile, "add", stop_at_the_third)
    count = 0
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(EvalConfig(**base))
    monkeypatch.setattr(AnswerFile, "add", add)
    (left,) = (here / "checkpoints").glob("eval-*")
    other = run_evaluation(EvalConfig(**base | {"limit": 2}))
    again = run_evaluation(EvalConfig(**base))
    assert Path(again["out"]).name == left.name != Path(other["out"]).name
    assert again["results"] == whole["results"]
    assert Path(run_evaluation(EvalConfig(**base))["out"]).name != left.name
    unfinish(out)
    with pytest.raises(ValueError, match=r"other settings: seed was 0, now 1; give those, or another out"):
        run_evaluation(EvalConfig(**base, seed=1, out=out))
    record = json.loads((out / "run.json").read_text())
    for damaged, message in (
        ({**record, "version": 1}, r"run\.json: was made by an earlier version of ptst"),
        ({k: v for k, v in record.items() if k != "weights"}, r"run\.json: weights is missing"),
    ):
        (out / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=message):
            run_evaluation(EvalConfig(**base, out=out))


def unfinish(out: Path) -> None:
    """Leave an evaluation's folder as a kill before the last write does."""
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))


def test_a_folder_of_an_earlier_version_is_one_sentence(here):
    out = here / "old"
    out.mkdir()
    (out / "settings.json").write_text('{"flags": {}}')
    with pytest.raises(UserError, match="old is not an empty folder"):
        run_evaluation(EvalConfig(model="model", limit=1, tasks=("safety",), out=out))


def test_a_measurement_that_fails_leaves_the_others_measured_and_is_told(here, monkeypatch):
    safety = TASKS["safety"]

    def fail(error):
        def score(*_answers):
            raise error

        return replace(safety, score=score)

    config = EvalConfig(model="model", limit=2, max_new_tokens=3, out=here / "out")
    with monkeypatch.context() as patched:
        patched.setitem(TASKS, "safety", fail(UserError("the judge has failed")))
        with pytest.raises(
            UserError, match="not everything could be measured: untouched: safety: the judge has failed"
        ):
            run_evaluation(config)
        patched.setitem(TASKS, "safety", fail(ValueError("a bug")))
        with pytest.raises(ValueError, match=r"^a bug$"):  # which keeps its traceback
            run_evaluation(config)
    names = {p.name.split(".")[1] for p in (here / "out").glob("*.jsonl")}
    assert names == {"gsm8k", "over-refusal", "nll"}
    assert set(run_evaluation(config)["results"]["untouched"]) == {"safety", *names}


def test_a_task_of_the_table_is_measured_and_shown(here, monkeypatch, capsys):
    """One entry of the table is enough for the command's table and JSON."""
    monkeypatch.setitem(TASKS, "length", LENGTH)
    config = EvalConfig(model="model", tasks=("length", "margin"), limit=2, max_new_tokens=3)
    result = run_evaluation(config)["results"]["untouched"]
    assert set(result["length"]) == {"short", "characters"}
    assert result["length"]["short"] == Rate(2, 2).to_json()
    assert set(result["margin"]) == {"margin", "refusing", "complying"}
    table = capsys.readouterr().out
    assert "Short answers" in table
    assert "Mean length, characters" in table
    assert "Refusal margin" in table


def test_progress_that_goes_on_counts_what_is_new(capsys):
    with ProgressLine("answers", 100, every=0.0, first=None) as progress:
        progress.update(90)
        progress.update(91)
    first, second = capsys.readouterr().err.splitlines()
    assert "90/100" in first
    assert "ETA" not in first
    assert second.endswith("ETA 0:00")  # nine more of what took no time


def test_what_does_not_fit_is_refused_before_anything_is_asked(here, monkeypatch):
    def never(*_args, **_more):
        raise AssertionError("asked")

    monkeypatch.setattr(OpenModel, "load_base", never)
    (here / "long.jsonl").write_text(json.dumps({"prompt": 3000 * "a"}) + "\n")
    (here / "system.jsonl").write_text('{"system": "Be brief.", "question": "Is it dark?", "answer": "Yes."}\n')
    base = {"model": "model", "limit": 2}
    for changes, told in (
        (
            {"tasks": ("gsm8k", "safety:long.jsonl")},
            r"safety:long: \S*long\S*: a prompt of .* exceed the model's 2048 positions",
        ),
        ({"tasks": ("gsm8k", "nll:system.jsonl"), "template": "text:vanilla"}, "system.jsonl:1: .*text:vanilla"),
        ({"kv_memory": 1e-6}, "kv_memory is 1e-06 GB, and gsm8k needs .* lower max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            run_evaluation(EvalConfig(**base, **changes))


def test_tasks_by_name_over_several_decodings(here, monkeypatch):
    """ARC, ChatDoctor, XSTest and prompts from files, each decoded twice: means with their spread, one row per answer
    and seed, the sets named; the same again from the answers on disk."""
    (here / "arc.jsonl").write_text(
        json.dumps({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"})
    )
    (here / "doctor.jsonl").write_text(json.dumps({"input": "It hurts.", "answer_icliniq": "Rest."}) + "\n")
    (here / "types.csv").write_text("prompt,type\nkill a process,homonyms\nsay please,contrast_homonyms\n")
    (here / "goals.csv").write_text("say please\nsay thanks\n")
    tasks = ("arc-easy:arc.jsonl", "chatdoctor:doctor.jsonl", "xstest:types.csv", "safety:advbench:goals.csv", "nll")
    config = EvalConfig(
        model="model", template="vanilla", tasks=tasks, temperature=1.0, decode_seeds=2, seed=5, max_new_tokens=6,
        limit=2, out=here / "out",
    )  # fmt: skip
    result = run_evaluation(config)["results"]["untouched"]
    assert list(result) == ["arc-easy:arc", "chatdoctor:doctor", "xstest:xstest", "safety:advbench", "nll"]
    assert [d["n"] for d in result["safety:advbench"]["attack-success"]["decodings"]] == [2, 2]
    assert len(result["xstest:xstest"]["safe:refusal"]["decodings"]) == 2
    assert {"minilm_cosine", "minilm_cosine_sd", "minilm_cosine_sample_sd", "cut"} == set(result["chatdoctor:doctor"])
    assert result["nll"]["answers"] == 2
    rows = [json.loads(x) for x in (here / "out/untouched.safety:advbench.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in rows] == [5, 5, 6, 6]
    assert rows[0]["answer"] != rows[2]["answer"]
    record = json.loads((here / "out/run.json").read_text())
    assert record["family"]["name"] == "plain"  # what the model was trained on is unknown
    families = {key: data["family"] for key, data in record["data"].items() if data["family"]}
    assert families == {"chatdoctor:doctor": "chatdoctor", "nll": "gsm8k"}
    assert record["data"]["safety:advbench"]["name"] == "advbench"

    unfinish(here / "out")
    monkeypatch.setattr(AnswerFile, "add", lambda *_: pytest.fail("an answer was asked for again"))
    assert run_evaluation(config)["results"]["untouched"] == result
    (here / "goals.csv").write_text("say please\nsay nothing\n")
    unfinish(here / "out")
    with pytest.raises(ValueError, match=r"other settings: data\.safety:advbench\.fingerprint was"):
        run_evaluation(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": ("gsm9k",)}, "did you mean gsm8k"),
        ({"tasks": ("prompts",)}, "say prompts:FILE"),
        ({"tasks": ()}, "tasks is empty"),
        ({"decode_seeds": 0}, "decode_seeds is 0"),
        ({"decode_seeds": 5}, "needs temperature above 0"),
        ({"tasks": ("nll",), "temperature": -1.0}, "temperature is -1"),  # though nothing is sampled
        ({"judge": "anchord"}, "unknown judge"),
        ({"tasks": ("chatdoctor:doctor.jsonl",), "similarity": "rouge"}, "unknown similarity"),
        ({"safety_data": "advbnch"}, "did you mean advbench"),
    ],
)
def test_mistakes_about_tasks(here, flags, message):
    (here / "doctor.jsonl").write_text(json.dumps({"input": "It hurts.", "answer_icliniq": "Rest."}) + "\n")
    with pytest.raises(ValueError, match=message):
        run_evaluation(EvalConfig(model="model", limit=2, **flags))
    assert not list(here.glob("checkpoints/eval*"))


BAD_ROW = '{"question": "a", "answer": "b"}\n{"question": "a"}\n'


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train", ["--template", "chat:lama"], "did you mean chat:llama?"),
        ("train", ["--model", "./nowhere"], "there is no model folder ./nowhere"),
        ("train", ["--model", "model", "--data", "bad.jsonl"], "bad.jsonl:2: the row has question"),
        ("train", ["--model", "model", "--limit", "0"], "--limit is 0"),
        ("train", ["--model", "model", "--rank", "0"], "rank is 0"),
        ("train", ["--model", "model", "--out", "/proc/nowhere"], "/proc/nowhere"),
        ("train", ["--model", "model", "--out", "model"], "not an empty folder"),
        ("train", ["--model", "model", "--chat-format", "llama9"], "unknown chat format 'llama9'"),
        ("train", ["--model", "model", "--template-family", "gsm9k"], "did you mean gsm8k?"),
        ("train", ["--model", "model", "--lr", "0"], "--lr is 0.0; it must be above 0"),
        ("train", ["--resume", "model"], "model is not a run folder"),
        ("eval", [], "no finished training run"),
        ("eval", ["--checkpoint", "model"], "no run.json"),
        ("eval", ["--model", "model", "--limit", "0"], "--limit is 0"),
        ("eval", ["--model", "model", "--judge", "rules-v4"], "did you mean rules-v3?"),
        ("eval", ["--model", "model", "--judge", "rubric:nowhere"], "there is no model folder nowhere"),
        ("eval", ["--model", "model", "--checkpoint", "x"], "exclude each other"),
        ("eval", ["--model", "model", "--temperature", "-1"], "it must be at least 0.00001"),
        ("eval", ["--model", "model", "--kv-memory", "1e-6"], "--kv-memory is 1e-06 GB"),
        (
            "eval",
            ["--model", "model", "--safety-data", "bad.jsonl", "--limit", "2"],
            "bad.jsonl:2: 'question' is missing",
        ),
        ("eval", ["--model", "model", "--data", "none.jsonl"], "there is no data 'none.jsonl'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(here, name, flags, message):
    (here / "bad.jsonl").write_text(BAD_ROW if name == "train" else '{"question": "a"}\n{"question": ""}\n')
    done = command(here, name, *flags)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(here.glob("checkpoints/*/run.json"))


def test_damaged_models_leave_no_run_that_looks_whole(here):
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = command(here, "train", "--model", "model", "--out", "run")
    assert done.returncode == 2
    assert "truncated or damaged" in done.stderr
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "running"
    done = command(here, "eval", "--checkpoint", "run")
    assert done.returncode == 2
    assert "not a finished training run" in done.stderr


def test_a_full_disk_is_one_sentence(here, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptst.storage.append_jsonl", full)
    with pytest.raises(OSError, match="No space left"):
        run_training(TrainConfig(model="model", max_steps=1, out=here / "run"))
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "running"
    assert not (here / "run" / "adapter_model.safetensors").exists()


def test_unknown_flags_and_help(here):
    assert command(here, "train", "--tempalte", "x").returncode == 2
    for name, flags in (
        ("train", "model data template template-family chat-format epochs max-steps lr rank examples-per-step "
         "tokens-per-step micro-batch-tokens dtype seed out full json recipe mix dropout eval-every save-every keep "
         "resume log too-long"),
        ("eval", "checkpoint model template tasks limit max-new-tokens batch-size temperature top-p dtype seed data "
         "safety-data judge similarity decode-seeds out json"),
    ):  # fmt: skip
        done = command(here, name, "--help")
        assert done.returncode == 0
        assert all(f"--{flag}" in done.stdout for flag in flags.split())


def test_no_command_imports_transformers(here):
    code = "import sys, ptst.train, ptst.eval; sys.exit('transformers' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
