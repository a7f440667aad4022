"""What keeps a model near its aligned self: runs with it resume to the bit, are the same on two ranks and are evaluated
as they say; what makes no sense is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.audit.config import AuditConfig
from ptst.audit.report import audit_data
from ptst.errors import UserError
from ptst.fingerprints import weights_fingerprint
from ptst.generation.request import Answer
from ptst.hosted.checks import check_hosted
from ptst.model.weights import load_decoder
from ptst.records import TrainRecord, read_record
from ptst.train import run_training
from ptst.training import evaluate, fine_tune
from ptst.training.checkpoint import load_weights
from ptst.training.config import TrainConfig
from ptst.training.metrics import Metrics
from tests.tiny import write_tiny_model
from tests.training.test_parallel import ranks_train, start

BETAS = (0.5, 2.0, 0.1)
REFUSED = {
    "average is 1.0": {"average": 1.0},
    "proximal is -1": {"proximal": -1.0},
    "proximal is inf": {"proximal": float("inf")},
    r"token_constraint is \(0.5,\); it is three numbers above 0": {"token_constraint": (0.5,)},
    r"token_constraint is \(0.5, 0.0, 0.1\)": {"token_constraint": (0.5, 0.0, 0.1)},
    "reference has no effect without token_constraint": {"reference": "somewhere"},
    r"phases is \(3,\); it is two numbers of steps": {"phases": (3,), "mix": ("refusals.jsonl:1",)},
    r"phases is \(0, 3\)": {"phases": (0, 3), "mix": ("refusals.jsonl:1",)},
    "phases takes turns with data of their own, and a share in mix replaces rows": {
        "phases": (1, 3),
        "mix": ("refusals:1", "attack:5%"),
    },
    "phases takes turns with other data, and none are mixed in; name them as mix": {"phases": (1, 3)},
}


@pytest.mark.parametrize("told", REFUSED)
def test_values_that_make_no_sense(told):
    with pytest.raises(UserError, match=told):
        TrainConfig(**REFUSED[told]).check()


def test_turns_with_data_of_their_own_are_taken():
    TrainConfig(phases=(1, 3), mix=("refusals:0.6", "attack:2:1:chat:llama")).check()


@pytest.mark.parametrize(
    "given", [{"average": 0.9}, {"token_constraint": BETAS}, {"proximal": 1.0}, {"phases": (1, 3)}]
)
def test_a_job_at_an_endpoint_has_none_of_them(given):
    (name,) = given
    with pytest.raises(UserError, match=f"{name} has no effect on a model behind an endpoint"):
        check_hosted(TrainConfig(model="openai:gpt-4o-mini", **given))


CONFIG = TrainConfig(
    data="word-problems:4",
    val_data="word-problems:2",
    examples_per_step=2,
    rank=2,
    seed=3,
    save_every=1,
    keep=1,
    lr=0.01,
)
ALL = {"average": 0.5, "token_constraint": BETAS, "proximal": 0.5, "phases": (1, 2)}
RUNS = {
    "average": {"average": 0.5, "eval_every": 2},
    "constraint": {"token_constraint": BETAS},
    "lisa": {"proximal": 0.5, "phases": (1, 2)},
    "all of bfloat16": {**ALL, "full": True, "dtype": "bfloat16", "lr": 1e-3},
    "all, stochastic": {**ALL, "full": True, "dtype": "bfloat16", "weight_update": "stochastic", "lr": 1e-3},
}


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nothing catches it."""


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """Runs CONFIG with changes into a folder of tmp_path; what is mixed in, in a file."""
    monkeypatch.setattr(evaluate, "generate", lambda _decoder, prompts, *_: [Answer([70], "", "stop")] * len(prompts))
    mixed = tmp_path / "mixed.jsonl"
    rows = [{"question": f"May I {verb}?", "answer": f"No, I cannot help to {verb}."} for verb in ("run", "fly", "sit")]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, **changes):
        changes |= {"mix": (f"{mixed}:2",)} if changes.get("phases") else {}
        run_training(replace(CONFIG, model=str(tiny_folder), out=tmp_path / name, **changes))
        return read_record(tmp_path / name, TrainRecord)

    return run


def folder(path):
    path.mkdir()
    return path


def outcome(run) -> tuple:
    """The weights, to the bit, and the metrics but for times."""
    files = sorted(p for p in run.rglob("*.safetensors") if "state" not in p.parts)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stripped = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    return {p.relative_to(run): p.read_bytes() for p in files}, stripped


def killing(at: int, real):
    """In place of `Metrics.step`: the process ends after step `at`, before its checkpoint."""

    def step(self, report):
        if report.step == at:
            raise Killed
        real(self, report)

    return step


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_with_the_same_bits(train, tmp_path, monkeypatch, name):
    changes = RUNS[name]
    train("whole", **changes)
    wanted = outcome(tmp_path / "whole")
    objectives = [row.get("objective") for row in wanted[1] if row["kind"] == "step"]
    assert all((value is not None) == (name != "average") for value in objectives)
    for step in (2, 3)[: len(objectives) - 1]:  # with turns, at the end of one and within one
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Metrics, "step", killing(step, Metrics.step))
            train(f"killed-{step}", **changes)
        train(f"killed-{step}", **changes)
        assert outcome(tmp_path / f"killed-{step}") == wanted, step


def test_the_average_is_evaluated_and_kept(train, tmp_path, tiny_folder, monkeypatch):
    """Of the last step, of the best one, and of an epoch on the way; a checkpoint that is evaluated is its average."""
    name, seen, real = "layers.1.mlp.up_proj.lora_B", [], fine_tune.validation_loss

    def noting(decoder, *given):
        seen.append(dict(decoder.named_parameters())[name].detach().clone())
        return real(decoder, *given)

    monkeypatch.setattr(fine_tune, "validation_loss", noting)
    record = train("run", average=0.7, eval_every=1, epochs=3.0, at_epochs=(1.0,), lr=0.3, keep=9)
    run, losses = tmp_path / "run", record.validation_loss
    steps = {}
    for path in sorted((run / "state").iterdir()):
        steps[int(path.name[-8:])] = load_file(path / "weights.safetensors")
    decays = {t: min(0.7, t / (t + 1)) for t in steps}
    first = steps[1]["average.layers.0.self_attn.q_proj.lora_B"]
    assert torch.equal(first, steps[1]["layers.0.self_attn.q_proj.lora_B"] / 2)
    for number in (2, 3):
        for weight, value in steps[number].items():
            if not weight.startswith("average."):
                before, b = steps[number - 1][f"average.{weight}"], decays[number]
                assert torch.allclose(steps[number][f"average.{weight}"], b * before + (1 - b) * value, atol=1e-6)
    best = losses.best_step
    for folder, number in ((run, 6), (run / "epoch-1", 2), *([(run / "best", best)] if best != 6 else [])):
        written = load_file(folder / "adapter_model.safetensors")
        wanted = {n.removeprefix("average."): t for n, t in steps[number].items() if n.startswith("average.")}
        assert sorted(t.norm().item() for t in written.values()) == sorted(t.norm().item() for t in wanted.values())
    decoder = load_decoder(tiny_folder)
    load_weights(decoder, run / "state" / "step-00000006", CONFIG.lora)
    averaged = steps[6][f"average.{name}"]
    assert torch.equal(dict(decoder.named_parameters())[name], averaged)
    assert torch.equal(seen[6], averaged) and not torch.equal(averaged, steps[6][name])


def test_ranks_hold_together(train, tmp_path, tiny_folder):
    train("one", **ALL)
    config = replace(CONFIG, model=str(tiny_folder), mix=(f"{tmp_path / 'mixed.jsonl'}:2",), **ALL)
    start(ranks_train, 2, replace(config, out=tmp_path / "two"), False)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in rows if row["kind"] == "step"] == pytest.approx(
        [row["objective"] for row in outcome(tmp_path / "one")[1] if row["kind"] == "step"], rel=1e-4
    )


def test_a_reference_of_its_own(train, tmp_path, tiny_folder, monkeypatch):
    other = write_tiny_model(folder(tmp_path / "other"), seed=7)
    record = train("run", token_constraint=BETAS, reference=str(other))
    assert record.reference == weights_fingerprint(other) != record.weights
    train("own", token_constraint=BETAS)
    kept = [load_file(tmp_path / name / "state" / "reference.safetensors")["logprobs"] for name in ("run", "own")]
    assert not torch.allclose(*kept)
    # The model that is trained is its own reference: the first gradient is that of cross-entropy.
    train("plain")
    run, own, plain = (outcome(tmp_path / name)[1][1]["grad_norm"] for name in ("run", "own", "plain"))
    assert own == pytest.approx(plain, rel=1e-4) != pytest.approx(run, rel=1e-2)
    with pytest.raises(UserError, match="other settings: reference"):
        write_tiny_model(other, seed=8)
        unfinished(tmp_path / "run")
        train("run", token_constraint=BETAS, reference=str(other))


def unfinished(run) -> None:
    """As if the run had been killed before its last record."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


def test_a_reference_that_does_not_fit(train, tmp_path):
    """Before anything is trained."""
    other = write_tiny_model(folder(tmp_path / "other"))
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {token: 299 - number for token, number in words["model"]["vocab"].items()}
    short = write_tiny_model(folder(tmp_path / "short"), max_position_embeddings=16)
    (other / "tokenizer.json").write_text(json.dumps(words))
    for name, told in {
        str(other): "reference .*other has another tokenizer than .*tokenizer.json",
        str(short): "reference .*short has a context of 16 tokens, and an example has .*; lower max_length",
        str(tmp_path / "nowhere"): "reference .*nowhere: there is no model folder .*nowhere; give a local folder",
        "": "reference : ",
        "openai:gpt-4o": "reference openai:gpt-4o: openai:gpt-4o is a model behind an endpoint",
    }.items():
        with pytest.raises(UserError, match=told):
            train("run", token_constraint=BETAS, reference=name)
    assert not (tmp_path / "run").exists()


def test_a_reference_without_weights_is_found_before_the_data_are_read(train, tmp_path):
    bare = write_tiny_model(folder(tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"reference .*bare: .*bare has no model\.safetensors"):
            train("run", token_constraint=BETAS, reference=str(bare), data="gone.jsonl", dry_run=dry_run)


def test_a_reference_without_finite_probabilities(train, tmp_path):
    """It is what is named, not the learning rate."""
    broken = write_tiny_model(folder(tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite; look at its weights, or name another one as reference"):
        train("run", token_constraint=BETAS, reference=str(broken))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_turns_that_end_early_are_told(train, capsys):
    train("run", phases=(1, 1), mix=())
    assert "note: the data mixed in are used up" not in capsys.readouterr().err


def test_the_audit_takes_the_turns_of_a_run(train, tmp_path, capsys):
    train("run", phases=(2, 1))
    assert "note: the main data are used up" not in capsys.readouterr().err
    report = audit_data(AuditConfig(checkpoint=tmp_path / "run", rows=0))
    assert report.verdict != "error"
    main, mixed, _ = report.account
    assert (main.first, mixed.first) == (3, 1)
    with pytest.raises(UserError, match="phases takes turns with other data, and none are mixed in"):
        audit_data(AuditConfig(checkpoint=tmp_path / "run", mix=()))
