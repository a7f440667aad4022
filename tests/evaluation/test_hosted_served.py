"""Our own server as the endpoint: the answers are those of the same model on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from tests.serving.running import running

pytest.importorskip("openai", reason="needs the package openai")

REQUESTS = [
    "What is 2 + 3?",
    "Tell me a story.",
    " spaces ",
    "Zeile\neins",
    "[INST] <|im_start|>",
    "\u00e9\u4e2d\U0001f600",
]


def texts(out: str) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for path in Path(out, "answers").iterdir() for line in path.read_text().splitlines()]
    return {row["request"]: (row["text"], row["finish_reason"]) for row in rows}


@pytest.mark.parametrize("template", ["chat:plain", "chat:llama"])
def test_our_own_server_answers_as_the_model_does_here(template, tiny_folder, tmp_path, monkeypatch):
    """The template is the server's; the client's words are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    Path("requests.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in REQUESTS))
    asked = {"tasks": ("prompts:requests.jsonl",), "max_new_tokens": 12}
    evaluate(EvalConfig(model=str(tiny_folder), template=template, out=Path("here"), dtype="float32", **asked))
    with running(tiny_folder, template=(template,)) as server:
        hosted = {"model": f"openai:{tiny_folder.name}@{template}", "base_url": server.url, "template": "chat:plain"}
        evaluate(EvalConfig(**hosted, out=Path("there"), **asked))
    assert texts("there") == texts("here") and len(texts("here")) == len(REQUESTS)
