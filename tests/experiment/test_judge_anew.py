"""A grid whose cells another judge judged judges its kept answers anew; no answer is generated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ptst.errors import UserError
from ptst.evaluation import answers
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judging import judge_answers as judge
from ptst.evaluation.keywords import KEYWORD_JUDGES
from tests.experiment.conftest import CONFIG, ONE_RUN, finished

FIRST, SECOND = (EvalSettings(**{**vars(CONFIG.eval), "judge": f"keywords-{n}"}) for n in (12, 38))
SMALL = replace(ONE_RUN, tasks=("safety", "gsm8k"), eval=FIRST)


def judged_by(folder) -> dict[str, str]:
    cells = {p.name: json.loads(p.read_text()) for p in folder.glob("cells/*/*.json")}
    return {name: cell["judge"]["name"] for name, cell in cells.items()}


def test_another_judge_judges_the_kept_answers(grid, here, monkeypatch):
    grid("grid", SMALL)
    before = finished(here / "grid")
    monkeypatch.setattr(answers, "Engine", lambda *_a, **_k: pytest.fail("no answer is generated"))
    result = grid("grid", replace(SMALL, eval=SECOND))
    after = finished(here / "grid")
    assert {path for path in before if before[path] != after[path]} == {p for p in before if "safety" in p}
    rows = (here / "grid/cells/untouched/chat-llama.safety.rows.jsonl").read_text()
    assert '"judge": "keywords-38"' in rows and '"judge": "keywords-12"' not in rows
    recorded = json.loads((here / "grid/results.json").read_text())["settings"]["eval"]["judge"]
    assert (recorded, len(result["cells"])) == ("keywords-38", 2)
    report = judge(JudgeConfig(folder=here / "grid", judge=("keywords-7",)))
    assert set(report["judges"]) == {"keywords-7", "keywords-12", "keywords-38"}, "earlier verdicts are kept"
    assert {(s["model"], s["judged"]) for s in report["shares"]} == {
        ("untouched under chat:llama", 3),
        ("chat-vanilla.seed0 under chat:llama", 3),
    }


def test_another_version_of_the_judge_judges_anew_and_without_answers_it_is_one_sentence(grid, here, monkeypatch):
    small = replace(SMALL, tasks=("safety",))
    grid("grid", small)
    newer = replace(KEYWORD_JUDGES["keywords-12"], source="a newer list")
    monkeypatch.setitem(KEYWORD_JUDGES, "keywords-12", newer)
    grid("grid", small)
    for path in here.glob("grid/cells/*/*.json"):
        assert json.loads(path.read_text())["judge"]["source"] == "a newer list"
        path.with_suffix(".answers.jsonl").unlink()
    message = r"safety\.json: was judged by another judge than now: name was keywords-12, now keywords-38; .*remove .*"
    with pytest.raises(UserError, match=message):
        grid("grid", replace(small, eval=SECOND))
