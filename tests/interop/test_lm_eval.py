"""lm-eval's model class against lm-eval itself: the scores of its own class on the same folder, and our ids under a
template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from ptst.errors import UserError
from ptst.text.segments import Conversation, Message
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the package lm-eval (ptst-lab[lm-eval])")

ROWS = [
    {"q": "The sum of 2 and 2", "a": "four", "choices": [" four", " the five", "\n\nsix"], "gold": 0},
    {"q": "Say <|im_end|> in the hat ", "a": "<|im_end|>", "choices": [" yes", " no", "<|im_end|>"], "gold": 2},
    {"q": "the theme " * 30, "a": "in", "choices": ["in", " in", " the in"], "gold": 1},
]


PLAIN = [{**row, "q": row["q"].replace("<|im_end|>", "it"), "a": "x", "choices": [" a", " the"]} for row in ROWS]


def tasks(rows, end: str = "") -> list[dict]:
    """One of each kind of request; the data are here. `end`: of every prompt."""
    from datasets import Dataset, DatasetDict

    shared = {
        "custom_dataset": lambda **_options: DatasetDict({"test": Dataset.from_list(rows)}),
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "Q: {{q[:40]}}\nA:" + end,
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    until = {"output_type": "generate_until", "doc_to_target": "a", "metric_list": [{"metric": "exact_match"}]}
    until |= {"generation_kwargs": {"until": ["\n", "R"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "q"}
    rolling |= {"metric_list": [{"metric": "word_perplexity"}]}
    named = {"choice": choice, "until": until, "rolling": rolling}
    return [{"task": name, **shared, **own} for name, own in named.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), model_type="llama")


def run(lm, wanted, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    mine = TaskManager(include_defaults=False)  # reading all of lm-eval's tasks takes long
    return simple_evaluate(model=lm, tasks=wanted, bootstrap_iters=0, task_manager=mine, **options)


def responses(results, task):
    return [sample["resps"] for sample in results["samples"][task]]


def test_the_same_as_lm_evals_own_class(folder):
    """Log-likelihoods within 1e-4, the same greedy choices and texts; windows where a text exceeds the context."""
    pytest.importorskip("transformers", reason="lm-eval's own class needs it")
    pytest.importorskip("accelerate", reason="lm-eval's own class needs it")
    from lm_eval.models.huggingface import HFLM

    from ptst.interop.harness_model import EngineLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, max_length=100)
    ours = EngineLM(model=folder, batch_size=2, max_length=100)
    wanted = [{**task, "num_fewshot": 1 if task["task"] == "until" else 0} for task in tasks(PLAIN, end=" ")]
    a, b = run(ours, wanted), run(theirs, wanted)
    assert responses(a, "until") == responses(b, "until")
    assert any(text for ((text,),) in responses(a, "until")), "some answer has words"
    pairs = [(x, y) for one, two in zip(responses(a, "choice"), responses(b, "choice"), strict=True)
             for (x,), (y,) in zip(one, two, strict=True)]  # fmt: skip
    assert len(pairs) == 6
    assert all(abs(x[0] - y[0]) < 1e-4 and x[1] == y[1] for x, y in pairs)
    for one, two in zip(responses(a, "rolling"), responses(b, "rolling"), strict=True):
        assert one[0][0] == pytest.approx(two[0][0], abs=1e-3)
    assert a["config"]["ptst_weights"].startswith("xxh3:")


def test_under_a_template_the_ids_are_ours(folder, monkeypatch):
    from ptst.interop import harness_model

    seen, prompts = [], []
    score, engine = harness_model.score, harness_model.Engine
    monkeypatch.setattr(harness_model, "score", lambda d, rows, **o: (seen.extend(rows), score(d, rows, **o))[1])

    class Watched(engine):
        def add(self, request):
            prompts.append(request.prompt)
            super().add(request)

    monkeypatch.setattr(harness_model, "Engine", Watched)
    lm = harness_model.EngineLM(model=folder, template="chat:llama", template_family="gsm8k")
    results = run(lm, tasks(ROWS)[:2], apply_chat_template=True, system_instruction="Be brief.", num_fewshot=0)
    p = lm.prompt_format
    system = Message("system", "Be brief.")
    asked = [Conversation((system, Message("user", f"Q: {row['q'][:40]}\nA:"))) for row in ROWS]
    assert prompts == [p.encode(c).ids for c in asked]
    wanted = []
    for row, c in zip(ROWS, asked, strict=True):
        for choice in row["choices"]:
            example = p.encode(Conversation((*c.messages, Message("assistant", choice))))
            end = max(i for i, t in enumerate(example.ids) if t == p.terminator_id)
            wanted.append((example.ids[:end], example.loss_mask[:end]))
    assert seen == wanted
    assert results["config"]["ptst_template"] == "chat:llama"
    assert "Question: Q: The sum" in results["samples"]["until"][0]["arguments"][0][0]


def test_refusals(folder):
    from lm_eval.api.instance import Instance

    from ptst.interop.harness_model import EngineLM

    with pytest.raises(UserError, match="unknown key 'tempalte'; did you mean template"):
        EngineLM(model=folder, tempalte="chat:llama")
    with pytest.raises(UserError, match="no model is named"):
        EngineLM()
    lm = EngineLM(model=folder, template="chat:llama", batch_size="auto", max_length=60)

    def asked(*arguments):
        return [Instance("generate_until", {}, arguments, 0, metadata=("t", 0, 1))]

    with pytest.raises(UserError, match="was not told to apply chat:llama; add --apply_chat_template"):
        lm.generate_until(asked("Hi", {"until": []}))
    rendered = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    for options, message in (
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"do_sample": True}, "do_sample needs a temperature"),
        ({"max_gen_toks": 4}, "exceed the 60 of the model"),
    ):
        with pytest.raises(UserError, match=message):
            lm.generate_until(asked(rendered, {"until": [], **options}))
    with pytest.raises(UserError, match="came back from its task as another text"):
        lm.loglikelihood(asked(rendered + " ", "yes"))
    with pytest.raises(UserError, match="opened under chat:llama"):
        lm.chat_template("tool_use")


@pytest.mark.thorough
def test_command_line(folder, tmp_path):
    """lm-eval's own command, on a task of a YAML file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    yaml = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}},
    }
    yaml |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}"}
    yaml |= {"doc_to_target": "gold", "doc_to_choice": "choices"}
    (tmp_path / "mine.yaml").write_text(json.dumps(yaml))
    command = [sys.executable, "-m", "ptst.interop.lm_eval", "run", "--model", "ptst", "--tasks", "mine"]
    command += ["--include_path", str(tmp_path), "--apply_chat_template", "--output_path", str(tmp_path / "out")]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--model_args", f"model={folder},template=chat:llama"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["ptst_template"] == "chat:llama"
    assert results["config"]["batch_size"] == "auto"
    done = subprocess.run(
        [*command, "--model_args", f"model={folder},template=chat:lama"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "did you mean chat:llama?" in " ".join(done.stderr.split())
