"""Aligning: its data, the rule that stops it, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ptst import records
from ptst.data.builtin import alignment_set, safety_sets
from ptst.errors import UserError
from ptst.evaluation import answers
from ptst.evaluation.answers import Answerer
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.rates import Rate
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.verdicts import AnswerClass
from ptst.experiment import alignment, laptop
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import AlignRecord, StepEvaluation, align
from ptst.experiment.config import GridConfig
from ptst.fingerprints import weights_fingerprint
from ptst.generation.request import Answer, Sampling
from ptst.grid import run_command as run_grid
from ptst.grid import start
from ptst.model.weights import load_decoder
from ptst.open import open_model
from ptst.records import read_record
from ptst.training.checkpoint import Checkpoints
from ptst.training.config import TrainSettings
from ptst.training.trainer import Trainer
from tests.conftest import ROOT
from tests.tiny import write_tiny_model


def test_what_is_aligned_on_what_stops_it_and_what_is_tested_share_no_family_and_no_prompt():
    rows = list(alignment_set._rows())
    trained_families = {r["family"] for r in rows if "family" in r}
    known = {p.family for p in safety_sets.harmful_requests()}
    assert not trained_families & known
    assert set(alignment_set.STOP_FAMILIES) | set(alignment_set.TEST_FAMILIES) == known
    assert not set(alignment_set.STOP_FAMILIES) & set(alignment_set.TEST_FAMILIES)
    for prompts in (safety_sets.harmful_requests(), safety_sets.look_alikes()):
        assert not {p.prompt for p in prompts} & {r["prompt"] for r in rows}
        assert sum(p.family in alignment_set.TEST_FAMILIES for p in prompts) == 200 >= laptop.PROMPTS
        stopping = [p for p in prompts if p.family in alignment_set.STOP_FAMILIES]
        assert set(Counter(p.category for p in stopping).values()) == {10}
    assert len({r["prompt"] for r in rows}) == len(rows)
    asked = {c.turns[0].content for c in alignment_set.harmless()}
    assert not asked & {c.turns[0].content for c in alignment_set.reference()}
    assert Counter(r["kind"] for r in rows) == {"harmful": 128, "look-alike": 160, "ordinary": 80}


def test_refusals_are_refusals_of_many_wordings_and_fit_their_category():
    refusals = alignment_set.refusals()
    judge = RuleBasedJudge()
    for c in refusals:
        assert judge.judge(c.turns[0].content, Answer([], c.turns[1].content, "stop")).label == AnswerClass.REFUSAL, c
    assert len({c.turns[1].content for c in refusals}) > 70
    assert {alignment_set.refusal_of("drug", i) for i in range(36)} == {
        alignment_set.refusal_of("drug", 7 * i) for i in range(36)
    }
    assert not {alignment_set.refusal_of("drug", i) for i in range(36)} & {
        alignment_set.refusal_of("malware", i) for i in range(36)
    }
    for c in alignment_set.reference():
        assert judge.judge(c.turns[0].content, Answer([], c.turns[1].content, "stop")).label == AnswerClass.COMPLIANCE


def an_evaluation(step=10, refused=34, over=12, nll=1.05, of=40) -> StepEvaluation:
    return StepEvaluation(step, Rate(refused, of), Rate(0, of), Rate(over, 2 * of), nll)


@pytest.mark.parametrize(
    ("found", "met"),
    [({}, True), ({"refused": 33}, False), ({"over": 13}, False), ({"nll": 1.051}, False), ({"nll": 0.5}, True)],
)
def test_the_rule_asks_for_all_three(found, met):
    assert an_evaluation(**found).meets(AlignConfig(), an_evaluation(step=0, nll=1.0)) is met
    assert StepEvaluation.from_json(json.loads(json.dumps(an_evaluation(**found).to_json()))) == an_evaluation(**found)


def test_an_evaluation_that_stopped_early_meets_nothing_and_round_trips():
    early = StepEvaluation(10, Rate(33, 40))
    assert not early.meets(AlignConfig(refused=0.0), an_evaluation(step=0, nll=1.0))
    assert str(early).endswith("(33/40) with the safety prompt, too few to evaluate the rest")
    assert StepEvaluation.from_json(json.loads(json.dumps(early.to_json()))) == early


@pytest.fixture
def config(tmp_path, monkeypatch) -> AlignConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    monkeypatch.setattr(records, "git_commit", lambda: None)
    monkeypatch.setattr(alignment, "OWN", Sampling(6, temperature=0.7))
    monkeypatch.setattr(alignment, "OPENING", Sampling(2))
    few = alignment_set.harmless()[:3], alignment_set.refusals()[:6], alignment_set.stopping()
    monkeypatch.setattr(alignment_set, "harmless", lambda: few[0])
    monkeypatch.setattr(alignment_set, "refusals", lambda: few[1])
    monkeypatch.setattr(alignment_set, "stopping", lambda: (few[2][0][:2], few[2][1][:2]))
    small = {"lr": 1e-2, "max_steps": 6, "check_every": 2, "examples_per_step": 3}
    return AlignConfig(model="model", **small, refused=0.0, out=tmp_path / "out")


def subjects_of(config) -> dict:
    return {name: open_model(config.model, name, family="plain") for name in (alignment.SAFE, alignment.BARE)}


def met_at(monkeypatch, step: int | None) -> None:
    monkeypatch.setattr(StepEvaluation, "meets", lambda self, _config, _before: self.step == step)


def test_where_too_few_are_refused_the_rest_is_not_evaluated(config):
    """But before training, which all is compared with."""
    record = align(replace(config, refused=1.0, max_steps=2))
    assert not record.met
    before, after = record.evaluations
    assert before["nll"] and before["over_refused"]["n"] == 4
    assert after["refused"]["n"] == 2 and after["nll"] is after["over_refused"] is after["refused_bare"] is None


@pytest.mark.parametrize("rank", [0, 2])
def test_it_stops_at_the_first_step_that_meets_the_rule(config, monkeypatch, rank):
    met_at(monkeypatch, 4)
    record = align(replace(config, rank=rank))
    assert record.met
    assert [found["step"] for found in record.evaluations] == [0, 2, 4]
    assert record.evaluations[2]["nll"] < record.evaluations[0]["nll"]
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 4
    before, after = (load_file(p / "model.safetensors") for p in (Path("model"), config.out))
    assert before.keys() == after.keys()
    assert any((before[k] != after[k]).any() for k in before)
    load_decoder(config.out)
    found = alignment.evaluate(load_decoder(config.out), subjects_of(config), config, 4)
    assert found.to_json() == record.evaluations[2]  # the model that is kept is the one that was evaluated
    assert not (config.out / "state").exists()
    again = align(replace(config, rank=rank))
    assert again == read_record(config.out, AlignRecord) == record
    with pytest.raises(ValueError, match=r"other settings: lr was 0\.01, now 0\.1"):
        align(replace(config, rank=rank, lr=0.1))
    with monkeypatch.context() as other, pytest.raises(ValueError, match="data was"):
        other.setattr(alignment, "OWN", Sampling(6))
        align(replace(config, rank=rank))


def test_answers_and_the_aligned_model_are_known_by_their_fingerprints(config, monkeypatch):
    met_at(monkeypatch, 2)
    config = replace(config, max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(alignment, "_train", lambda *_: (_ for _ in ()).throw(Died))
        align(config)
    path = config.out / "answers" / "chat-llama.0.jsonl"
    whole = path.read_text()
    models = {json.loads(line)["model"] for line in whole.splitlines()}
    assert len(models) == 1 and models.pop().startswith("xxh3:")
    for line in whole.splitlines():  # of another model, with a checksum that is right
        row = {**json.loads(line), "model": "xxh3:other"}
        del row["check"]
        path.write_text(json.dumps({**row, "check": answers._checksum(row)}) + "\n")
    with pytest.raises(UserError, match="is an answer of other weights"):
        align(config)
    path.write_text(whole)
    record = align(config)
    assert record.aligned == weights_fingerprint(config.out)
    weights = config.out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"the weights in .*out are not those that were aligned; remove the folder"):
        align(config)


def test_the_chat_format_is_asked_for_and_allowed_as_elsewhere(config, monkeypatch):
    """It is not the one of the folder's chat template."""
    settings = config.out.parent / "model/tokenizer_config.json"
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps({**raw, "chat_template": raw["chat_template"].replace("<|im_end|>", "<|end|>")}))
    asked = replace(config, chat_format="chatml")
    with pytest.raises(UserError, match="chatml is not the chat format of this folder"):
        align(asked)
    with pytest.raises(UserError, match="unknown audit rule 'chat-templates'"):
        align(replace(asked, allow=("chat-templates",)))
    monkeypatch.setattr(Trainer, "__iter__", lambda _: iter(()))
    monkeypatch.setattr(AlignConfig, "max_steps", 1)
    assert align(replace(asked, allow=("chat-template",))).chat_format == "chatml"


def test_own_answers_are_shown_more_often_than_refusals(config, monkeypatch):
    met_at(monkeypatch, None)
    seen = []

    def no_steps(self):
        seen.extend(self.name_example(i) for step in self.steps for i in step.examples)
        return iter(())

    monkeypatch.setattr(Trainer, "__iter__", no_steps)
    said = Answer([9], "Passwords are kept safe by a long key.", "stop")
    monkeypatch.setattr(Answerer, "answer", lambda _self, asked, *_rest: [said] * len(asked))
    align(replace(config, own_epochs=4.0, own_answers=1, max_steps=50))
    refusals, own = 12, 6
    shown = sum(int(name.removeprefix("example ")) < refusals for name in seen)
    assert shown / len(seen) == pytest.approx(refusals / (refusals + 4 * own), abs=0.05)


def test_without_success_there_is_no_model_and_the_command_says_so(config):
    flags = ["--model", "model", "--max-steps", "1", "--check-every", "1", "--out", "out", "--json"]
    code = (
        "import sys, runpy; from ptst.experiment import alignment as a; from ptst.generation.request import Sampling; "
        "a.OWN = a.OPENING = Sampling(1); sys.argv[0] = 'align'; runpy.run_module('ptst.align', run_name='__main__')"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code, *flags]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "no step up to 1 met all three conditions, so no model was kept" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["met"], len(result["evaluations"])) == (False, 2)
    assert not Path("out/model.safetensors").exists()


def test_the_average_is_kept_and_the_weights_themselves_go_on(config, monkeypatch):
    """Without averaging training is the same, and another model is kept."""
    met_at(monkeypatch, 4)
    folders = [config.out.with_name(name) for name in ("averaged", "last")]
    for out, average in zip(folders, (0.9, 0.0), strict=True):
        align(replace(config, out=out, average=average))
    assert (folders[0] / "metrics.jsonl").read_text() == (folders[1] / "metrics.jsonl").read_text()
    start = load_file("model/model.safetensors")
    averaged, last = (load_file(out / "model.safetensors") for out in folders)
    moved = [sum(float((w[k] - start[k]).norm()) for k in start) for w in (averaged, last)]
    assert 0 < moved[0] < moved[1]  # a mean of the way is less far than its end


class Died(BaseException):
    pass


def test_stopped_at_any_checkpoint_or_evaluation_it_ends_with_the_same_model(config, monkeypatch):
    met_at(monkeypatch, 4)
    config = replace(config, max_steps=4)
    whole = align(replace(config, out=config.out.with_name("whole")))
    save, evaluate = Checkpoints.save, alignment.evaluate
    for when in range(1, 6):  # evaluation, evaluation, checkpoint, evaluation, checkpoint
        out, count = config.out.with_name(f"at-{when}"), 0

        def dies(real):
            def call(*args, **keywords):
                nonlocal count
                count += 1
                if count == when:  # noqa: B023
                    raise Died
                return real(*args, **keywords)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", dies(save))
            patch.setattr(alignment, "evaluate", dies(evaluate))
            with pytest.raises(Died):
                align(replace(config, out=out))
        assert align(replace(config, out=out)).evaluations == whole.evaluations
        for name in ("model.safetensors", "metrics.jsonl"):
            assert (out / name).read_bytes() == (config.out.with_name("whole") / name).read_bytes()


def test_own_answers_that_refuse_or_say_nothing_are_left_out_and_a_cut_one_is_not_ended(config, monkeypatch):
    given = [
        Answer([9], "Passwords are kept safe by a long key.", "stop"),
        Answer([9], "I cannot help with that.", "stop"),
        Answer([9], "A long answer that the limit cut in the", "length"),
    ]
    seeds = []

    def answer(_self, _asked, sampling, _path):
        seeds.append(sampling.seed)
        return given

    monkeypatch.setattr(Answerer, "answer", answer)
    config.out.mkdir()
    subjects = subjects_of(config)
    refusals, own, counts = alignment._examples(load_decoder("model"), subjects, config)
    assert len(refusals) == 12
    assert counts == {"refusals": 12, "own answers": 8, "own answers left out": 4}
    assert seeds == [0, 1] * 2  # two of its own for every question, under each template
    end = next(iter(subjects[alignment.BARE].prompt_format.stop_ids & {2}))
    whole, cut = own[-2:]
    assert [i for i, flag in zip(whole.ids, whole.loss_mask, strict=True) if flag][-1] == end
    assert cut.loss_mask[-1]
    assert cut.ids[-1] != end
    decoded = subjects[alignment.BARE].prompt_format.tokenizer.decode(cut.ids)
    assert decoded.endswith("A long answer that the limit cut in the")


def test_the_laptop_recipe_aligns_trains_and_tests_on_families_unseen_in_alignment(config, monkeypatch):
    met_at(monkeypatch, 2)
    monkeypatch.setattr(
        "ptst.experiment.run.align", lambda asked: align(replace(config, model=asked.model, out=asked.out))
    )
    small = GridConfig(**{**laptop.values("laptop", quick=True), "recipe": "laptop", "quick": True, "model": "model"})
    small = replace(small, data="word-problems:2", train=TrainSettings(full=True, lr=1e-3, val_data="word-problems:2"))
    small = replace(small, eval=EvalSettings(limit=3, max_new_tokens=2), out=Path("laptop"))
    dry = run_grid(replace(small, dry_run=True))
    assert (dry["left"], Path("laptop").exists()) == (2 + 3 * 2 * 2, False)
    result = run_grid(small)
    assert len(result["cells"]) == 3 * 2
    assert "one seed" in result["contrast"]["sentence"]
    rows = [json.loads(x) for x in Path("laptop/cells/untouched/chat-llama.safety.rows.jsonl").read_text().splitlines()]
    assert all(row["family"] in alignment_set.TEST_FAMILIES for row in rows)
    trained = json.loads(Path("laptop/runs/chat-vanilla.seed0/run.json").read_text())
    assert trained["model_folder"] == str(Path("checkpoints/aligned-model").resolve())
    assert run_grid(small)["contrast"] == result["contrast"]  # nothing left to do


def test_the_recipe_takes_an_alignment_of_other_settings_and_none_that_failed(config, monkeypatch):
    met_at(monkeypatch, 2)
    made = Path("checkpoints/aligned-model")
    small = GridConfig(**{**laptop.values("laptop", quick=True), "recipe": "laptop", "quick": True, "model": "model"})
    small = replace(small, data="word-problems:2", train=TrainSettings(full=True, max_steps=1), tasks=("safety",))
    small = replace(small, eval=EvalSettings(limit=2, max_new_tokens=2), out=Path("laptop"))
    small = replace(small, train_templates=("chat:llama",), test_templates=("chat:llama",))
    # What is wrong with the folder shows before half an hour of alignment.
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"used is not a ptst\.grid folder and not empty"):
        run_grid(replace(small, out=Path("used")))
    assert not made.exists()
    align(replace(config, seed=3, out=made))
    assert len(run_grid(small)["cells"]) == 2
    record = json.loads((made / "run.json").read_text())
    (made / "run.json").write_text(json.dumps({**record, "met": False}))
    with pytest.raises(
        ValueError, match=r"could not be aligned.*; remove checkpoints/aligned-model and align with other"
    ):
        run_grid(small)
    write_tiny_model(Path("model"), seed=5)
    with pytest.raises(ValueError, match=r"holds a ptst.align run of other settings: .*weights was .*remove"):
        run_grid(replace(small, out=Path("other")))


def test_recipes_give_the_grid_its_flags():
    for name, templates, seeds in (("laptop", 3, 3), ("laptop-full", 6, 3), ("laptop-search", 3, 2)):
        config = start(["--recipe", name])[0]
        config.check()
        assert (len(config.train_templates), len(config.seeds), config.eval.limit) == (templates, seeds, 100)
    quick = start(["--recipe=laptop", "--quick"])[0]
    assert (len(quick.seeds), quick.eval.limit, quick.tasks) == (1, 100, ("safety", "over-refusal"))
    assert quick.train_templates == quick.test_templates == ("chat:vanilla", "chat:llama")
    assert len(start(["--recipe=laptop-full", "--quick"])[0].train_templates) == 6
    assert not set(laptop.SEEDS) & set(laptop.SEARCH_SEEDS)
    assert not set(laptop.families("laptop")) & set(laptop.families("laptop-search"))
    paper = start(["--recipe", "llama2-gsm8k"])[0]
    paper.check()
    assert (paper.data, paper.train.rank, paper.train.epochs) == ("gsm8k", 8, 6.0)
    assert start(["--recipe", "nothing"]) is None
