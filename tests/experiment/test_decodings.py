"""Cells that are means over several decodings of one run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.evaluation import answers
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.evaluate import evaluate
from ptst.experiment.ladder.gather import gather, part_of
from ptst.experiment.paper.beside import compare
from ptst.experiment.paper.measured import Results
from ptst.reporting.config import ReportConfig
from ptst.reporting.write import write_report
from tests.experiment.conftest import CONFIG, finished

DRAWN = replace(CONFIG.eval, temperature=1.5, decode_seeds=3, seed=5, judge="keywords-12")
DECODED = replace(CONFIG, seeds=(0,), tasks=("safety", "nll"), eval=DRAWN)


def figures(folder, cell: str) -> dict:
    return json.loads((folder / f"cells/{cell}.json").read_text())


def test_a_cell_is_a_mean_over_decodings(grid, here):
    found = grid("grid", DECODED)
    cell = figures(here / "grid", "untouched/chat-llama.safety")
    rows = [json.loads(line) for line in (here / "grid/cells/untouched/chat-llama.safety.rows.jsonl").open()]
    assert [row["seed"] for row in rows] == [5] * 3 + [6] * 3 + [7] * 3
    assert len({row["answer"] for row in rows}) > 3, "the decodings differ"
    rates = [cell["decodings"][seed]["refusal"]["rate"] for seed in ("5", "6", "7")]
    assert cell["result"]["refusal"]["rate"] == pytest.approx(sum(rates) / 3)
    line = next(c for c in found["cells"] if c["train"] == "untouched" and c["test"] == "chat:llama")
    refusal, nll = line["tasks"]["safety"]["refusal"], line["tasks"]["nll"]["nats_per_token"]
    assert (refusal["over"], refusal["judged"], refusal["prompts"]) == ("decodings of one run", 9, 3)
    assert list(refusal["runs"]) == [5, 6, 7] and nll.get("over") is None and list(nll["runs"]) == [0]
    text = (here / "grid/results.md").read_text()
    assert "mean over decodings of one run" in text and "3 decodings" in text and "3 seeds" not in text
    kept = found["kept"]["cells"][0]["measures"]["refusal"]
    assert (kept["seeds"], kept["sample"]) == (3, "decoding") and "decodings" in found["contrast"]["sentence"]


def test_decodings_are_those_of_an_evaluation(grid, here):
    """Whatever else is answered in the same batches; a value that is no rate has its spread over them, too."""
    (here / "doctor.jsonl").write_text(json.dumps({"input": "It hurts.", "answer_icliniq": "Rest."}) + "\n")
    grid("grid", replace(DECODED, tasks=("safety", "chatdoctor:doctor.jsonl")))
    run = here / "grid/runs/chat-vanilla.seed0"  # of which the base model is asked in the same words
    evaluate(EvalConfig(**vars(DRAWN), checkpoint=run, template="chat:llama", tasks=("safety",), out=here / "eval"))
    rows = (here / "grid/cells/untouched/chat-llama.safety.rows.jsonl").read_text()
    assert (here / "eval/untouched.safety.jsonl").read_text() == rows
    cell = figures(here / "grid", "untouched/chat-llama.chatdoctor-doctor")
    by_seed = [each["minilm_cosine"] for each in cell["decodings"].values()]
    results = json.loads((here / "grid/results.json").read_text())
    found = next(c for c in results["cells"] if c["train"] == "untouched" and c["test"] == "chat:llama")
    similar = found["tasks"]["chatdoctor:doctor"]["minilm_cosine"]
    assert list(similar["runs"].values()) == by_seed and similar["mean"] == pytest.approx(sum(by_seed) / 3)


def test_decodings_resume(grid, here, monkeypatch):
    grid("grid", DECODED)
    before, path = finished(here / "grid"), here / "grid/cells/untouched/chat-llama.safety.answers.jsonl"
    whole = path.read_text()
    path.with_name("chat-llama.safety.json").unlink()
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    asked = []
    run = answers.Engine.run
    monkeypatch.setattr(answers.Engine, "run", lambda self, r, *a, **k: (asked.extend(r), run(self, r, *a, **k))[1])
    grid("grid", DECODED)
    assert len(asked) == 5 and sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    after = finished(here / "grid")
    assert {p for p in before if before[p] != after[p]} == {str(path.with_name("chat-llama.safety.json"))}


def test_the_report_and_the_paper_say_what_figures_are_over(grid, here):
    found = grid("grid", DECODED)
    write_report(ReportConfig(folder=here / "grid"))
    page = (here / "grid/report.html").read_text()
    assert "3 decodings of one run" in page and "3 seeds" not in page
    assert "say nothing of further seeds" in page
    told = compare(Results(json.loads((here / "grid/results.json").read_text())), 4).departures
    assert "answers were drawn 3 times, the paper's 5" in told and found


def test_what_is_not_over_decodings_is_one_sentence(grid, here):
    with pytest.raises(UserError, match=r"several seeds of training and several eval\.decode_seeds.*leave one at 1"):
        grid("grid", replace(DECODED, seeds=(0, 1)))
    with pytest.raises(UserError, match="needs temperature above 0"):
        grid("grid", replace(DECODED, eval=replace(DRAWN, temperature=0.0)))
    with pytest.raises(UserError, match=r"the recipe ladder decodes once, and eval\.decode_seeds is 3"):
        replace(DECODED, recipe="ladder").check()
    grid("grid", DECODED)
    with pytest.raises(UserError, match=r"has 3 decodings, and a study compares runs of one"):
        gather([part_of(here / "grid")], {})
    path = here / "grid/cells/untouched/chat-llama.safety.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decodings": ["x"]}))
    with pytest.raises(UserError, match="its decodings have no results"):
        grid("grid", DECODED)
