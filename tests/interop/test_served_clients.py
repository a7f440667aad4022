"""Evaluators of others against `ptst serve`: each asks what it asks of any such server, and gets the engine's answers.

garak and PyRIT bring a gigabyte of packages each, so no extra of ours has them: `pip install garak pyrit` beside
`ptst-lab[serve]`, then these tests run, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.serving.running import running
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.thorough
TEXTS = [f"What is {i} and {i}?" for i in range(20)]


def needs(*packages: str):
    missing = next((name for name in packages if find_spec(name) is None), None)
    return pytest.mark.skipif(missing is not None, reason=f"needs the package {missing}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("served") / "", model_type="llama")


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, template=("chat:llama",), batch_size=16) as server:
        yield server


@pytest.fixture(scope="module")
def model(folder):
    return f"{folder.name}@chat:llama"


def ask(server, model: str, text: str, **options) -> str:
    """The server's own answer to a user's text."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
    return server.post("chat/completions", body | options).json()["choices"][0]["message"]["content"]


@needs("inspect_ai", "openai")
def test_inspect(server, model, folder, tmp_path, monkeypatch):
    """20 samples; the answers are those of the model in inspect_ai's own process."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, system_message

    import ptst.interop.registry  # noqa: F401 (without an installation there is no entry point)

    monkeypatch.setenv("PTST_BASE_URL", server.url)
    monkeypatch.setenv("PTST_API_KEY", "none")
    answers = []
    for name in (f"openai-api/ptst/{model}", f"ptst/{folder}@chat:llama"):
        samples = [Sample(id=i, input=text, target="x") for i, text in enumerate(TEXTS)]
        task = Task(dataset=samples, solver=[system_message("Be brief."), generate()], scorer=includes())
        options = {"max_tokens": 8, "temperature": 0.0, "log_dir": str(tmp_path), "display": "none"}
        (log,) = eval(task, name, **options)
        assert log.status == "success", log.error
        assert sum(u.output_tokens for u in log.stats.model_usage.values()) > 0
        answers.append({s.id: s.output.completion for s in log.samples})
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20


@needs("lm_eval", "transformers", "aiohttp", "tenacity")
def test_lm_eval(server, model, folder, monkeypatch):
    """Chat answers, and log-likelihoods by echo, of 20 items each: as our class has them without a server."""
    from datasets import Dataset, DatasetDict
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from ptst.interop.harness_model import EngineLM

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows = [{"q": text, "choices": [" a", " the", " four"], "gold": 0} for text in TEXTS]
    shared = {"custom_dataset": lambda **_options: DatasetDict({"test": Dataset.from_list(rows)}), "test_split": "test"}
    until = {"until": ["R"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    generate = {"task": "g", **shared, "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "gold"}
    generate |= {"generation_kwargs": until, "metric_list": [{"metric": "exact_match"}]}
    choose = {"task": "c", **shared, "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "gold"}
    choose |= {"doc_to_choice": "choices"}

    def responses(lm, task, **options):
        mine = TaskManager(include_defaults=False)
        found = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, task_manager=mine, **options)
        return [sample["resps"] for sample in found["samples"][task["task"]]]

    asked = {"model": model, "num_concurrent": 4, "max_retries": 1}
    chat = {**asked, "base_url": f"{server.url}/chat/completions"}
    own = EngineLM(model=folder, template="chat:llama")
    options = {"apply_chat_template": True}
    served = responses("local-chat-completions", generate, model_args=chat, **options)
    assert served == responses(own, generate, **options)
    assert len(served) == 20
    raw = {**asked, "base_url": f"{server.url}/completions", "tokenizer": str(folder)}
    served = responses("local-completions", choose, model_args=raw)
    plain = responses(EngineLM(model=folder), choose)
    compared = [(x[0], y[0]) for one, two in zip(served, plain, strict=True) for x, y in zip(one, two, strict=True)]
    assert len(compared) == 60
    for (logprob, greedy), (ours, is_greedy) in compared:
        assert float(logprob) == pytest.approx(ours, abs=1e-4)
        assert str(greedy) == str(is_greedy)


@needs("garak")
def test_garak(server, model, tmp_path):
    """A probe of its own with 20 prompts."""
    about = {"uri": f"{server.url}/", "max_tokens": 8, "temperature": 0.0}
    (tmp_path / "generator.json").write_text(json.dumps({"openai": {"OpenAICompatible": about}}))
    settings = "system:\n  parallel_requests: 8\nrun:\n  soft_probe_prompt_cap: 20\n  generations: 1\n"
    (tmp_path / "garak.yaml").write_text(settings)
    command = [sys.executable, "-m", "garak", "--config", str(tmp_path / "garak.yaml")]
    command += ["--target_type", "openai.OpenAICompatible", "--target_name", model, "--probes", "encoding.InjectROT13"]
    command += [
        "--generator_option_file",
        str(tmp_path / "generator.json"),
        "--report_prefix",
        str(tmp_path / "report"),
    ]
    environment = {"HOME": str(tmp_path), "OPENAICOMPATIBLE_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "report.report.jsonl").read_text().splitlines()]
    answered = [row for row in rows if row["entry_type"] == "attempt" and row["status"] == 2]
    assert len(answered) == 20
    for row in answered:
        (turn,) = row["prompt"]["turns"]
        ((output,), text) = row["outputs"], turn["content"]["text"]
        assert output["text"] == ask(server, model, text, stop=["#", ";"])  # garak's own stop strings


@needs("pyrit")
def test_pyrit(server, model, tmp_path, monkeypatch):
    """20 prompts at once through its target and its executor."""
    monkeypatch.setenv("HOME", str(tmp_path))
    from pyrit.executor.attack import AttackExecutor, PromptSendingAttack
    from pyrit.prompt_target import OpenAIChatTarget
    from pyrit.setup import initialize_pyrit_async

    async def attack():
        await initialize_pyrit_async(memory_db_type="InMemory")
        options = {"temperature": 0.0, "max_completion_tokens": 8}
        target = OpenAIChatTarget(endpoint=server.url, model_name=model, api_key="none", **options)
        executor = AttackExecutor(max_concurrency=20)
        return await executor.execute_attack_async(
            attack=PromptSendingAttack(objective_target=target), objectives=TEXTS
        )

    results = asyncio.run(attack()).completed_results
    assert [result.objective for result in results] == TEXTS
    for result in results:
        assert result.last_response.converted_value == ask(server, model, result.objective)
