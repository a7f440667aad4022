"""Constrained fine-tuning: its objective and gradient by the paper's formula, and the reference's log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.data.packing import share_prefixes, to_batch
from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.loss import batch_loss, constrained_loss
from ptst.model.weights import load_decoder
from ptst.text.encode import Example
from ptst.training import agreement, constraint
from ptst.training.constraint import (
    TokenConstraint,
    read_scores,
    reference_scores,
    score_examples,
    token_betas,
    write_scores,
)
from ptst.training.parallel import ALONE
from ptst.training.trainer import Trainer, TrainerConfig
from tests.training.steps import Recorder, examples

BETAS = (0.5, 2.0, 0.1)


def log_probabilities(decoder, example: Example) -> torch.Tensor:
    """Of one example's trained tokens, from all logits."""
    hidden = decoder.documents(torch.tensor(example.ids), [0, len(example.ids)])
    logits = (hidden @ decoder.head_VE.t()).log_softmax(-1)
    places = [i for i, trained in enumerate(example.loss_mask) if trained and i > 0]
    return torch.stack([logits[i - 1, example.ids[i]] for i in places])


def written_out(decoder, rows, references, betas=BETAS) -> torch.Tensor:
    """Equation 3 of Qi et al. 2025, token by token, of examples with one answer each; nothing divided."""
    total = torch.zeros((), dtype=torch.float64)
    for example, reference in zip(rows, references, strict=True):
        for place, (log_p, log_q) in enumerate(zip(log_probabilities(decoder, example), reference, strict=True), 1):
            beta = betas[0] if place == 1 else betas[1] if place <= 5 else betas[2]
            total = total - 2 / beta * torch.log(torch.sigmoid(beta * (log_p - log_q)))
    return total


def model(folder, full: bool):
    """In float64, with an adapter that is not zero, or all weights."""
    decoder = load_decoder(folder, torch.float64)
    if full:
        return decoder, dict(decoder.requires_grad_(True).named_parameters())
    parameters = add_lora(decoder, LoraConfig(rank=2, alpha=4))
    for number, p in enumerate(parameters.values()):
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return decoder, parameters


def references_of(rows) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = [sum(e.loss_mask[1:]) for e in rows]
    return [-6 + 3 * torch.randn(n, dtype=torch.float64, generator=generator) for n in sizes]


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("full", [False, True])
def test_objective_and_gradient_are_the_papers(tiny_folder, full):
    rows = examples(6)
    decoder, parameters = model(tiny_folder, full)
    references = references_of(rows)
    constraint = TokenConstraint.over(rows, BETAS, torch.cat(references))
    chosen = [4, 1, 5, 0]
    batch = to_batch([rows[i] for i in chosen])
    objective, loss = constrained_loss(decoder, batch, 7.0, *constraint.of(chosen, decoder.device))
    wanted = written_out(decoder, [rows[i] for i in chosen], [references[i] for i in chosen]) / 7
    assert objective.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert loss.item() == pytest.approx(batch_loss(decoder, batch, 7.0).item(), rel=1e-12)
    ours, theirs = (flat(torch.autograd.grad(value, list(parameters.values()))) for value in (objective, wanted))
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm() and theirs.norm() > 0
    assert not loss.requires_grad


@pytest.mark.parametrize("micro", [1, 17, 500])
def test_a_step_is_the_papers_however_it_is_split(tiny_folder, micro):
    """Also where documents share a prefix, and the trained tokens of a micro-batch are not in the order of the data."""
    shared = [Example([*range(3, 25), *e.ids], [False] * 22 + e.loss_mask, row=e.row) for e in examples(5)]
    rows = [*examples(4), *(Example(e.ids, e.loss_mask, row=4 + e.row) for e in shared)]
    batch = to_batch(rows[4:])
    assert share_prefixes(batch) is not batch
    decoder, parameters = model(tiny_folder, False)
    references = references_of(rows)
    config = TrainerConfig(examples_per_step=9, micro_batch_tokens=micro, clip=0)
    trainer = Trainer(decoder, parameters, rows, config)
    trainer.optimizer = recorder = Recorder(list(parameters.values()))
    trainer.constraint = TokenConstraint.over(rows, BETAS, torch.cat(references))
    (report,) = trainer
    trained = sum(map(len, references))
    wanted = written_out(decoder, rows, references) / trained
    theirs = flat(torch.autograd.grad(wanted, list(parameters.values())))
    assert (recorder.gradients[0] - theirs).norm() <= 1e-10 * theirs.norm()
    assert report.objective == pytest.approx(wanted.item(), rel=1e-10)
    assert report.loss == pytest.approx(batch_loss(decoder, to_batch(rows), trained).item(), rel=1e-10)


def test_where_the_model_is_the_reference_the_gradient_is_that_of_cross_entropy(tiny_folder):
    rows = examples(5)
    found = []
    for held in (False, True):
        decoder = load_decoder(tiny_folder, torch.float64)
        parameters = add_lora(decoder, LoraConfig(rank=2))
        trainer = Trainer(decoder, parameters, rows, TrainerConfig(clip=0))
        trainer.optimizer = recorder = Recorder(list(parameters.values()))
        if held:
            logprobs = torch.cat([log_probabilities(decoder, e).detach() for e in rows])
            trainer.constraint = TokenConstraint.over(rows, BETAS, logprobs)
        (report,) = trainer
        found.append((recorder.gradients[0], report))
    (plain, first), (constrained, second) = found
    assert (plain - constrained).norm() <= 1e-12 * plain.norm()
    assert first.loss == pytest.approx(second.loss, rel=1e-12) and first.objective is None


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        ("0111111101", [0.5, 2, 2, 2, 2, 0.1, 0.1, 0.5]),  # two answers, each with a first token
        ("1110", [0.5, 2]),  # nothing predicts a document's first token
        ("0000", []),
    ],
)
def test_places_are_counted_in_every_answer(mask, wanted):
    assert token_betas([c == "1" for c in mask], BETAS) == wanted


def scored(decoder, rows, used) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([*score_examples(decoder, rows, used, ALONE)]))


def test_the_scorer_gives_what_training_computes(tiny_folder, monkeypatch):
    rows = [*examples(70), Example([5, 6, 7], [False, False, False], row=70)]
    rows[3] = Example(rows[3].ids, [True] * len(rows[3].ids), row=3)  # nothing predicts its first token
    decoder = load_decoder(tiny_folder)
    found = scored(decoder, rows, range(71))
    wanted = torch.cat([log_probabilities(decoder, e) for e in rows[:-1]])
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-4
    some = scored(decoder, rows, {0, 69})
    first, last = (sum(rows[i].loss_mask[1:]) for i in (0, 69))
    assert torch.allclose(some[:first], found[:first], atol=1e-4) and some[first:-last].isnan().all()
    assert torch.allclose(some[-last:], found[-last:], atol=1e-4)
    monkeypatch.setattr(constraint, "_SCORED", 1)
    monkeypatch.setattr(constraint, "_PIECE", 5)
    assert torch.allclose(scored(decoder, rows, {0, 69}), some, atol=1e-4, equal_nan=True)
    decoder.head_VE.data[9] = torch.nan
    with pytest.raises(UserError, match="the reference model of the token constraint gives log-probabilities that are"):
        scored(decoder, rows, {0})


def test_scores_are_kept_and_not_trusted_blindly(tiny_folder, tmp_path, capsys):
    path, rows, loaded = tmp_path / "state" / "reference.safetensors", examples(4), []

    def scores(of: str):
        return reference_scores(rows, range(4), load, ALONE, path, of)

    def load():
        loaded.append(1)
        return load_decoder(tiny_folder)

    assert read_scores(path, "a") is None
    first = scores("a")
    assert torch.equal(scores("a"), first) and len(loaded) == 1
    assert "warning" not in capsys.readouterr().err
    for damage, told in (
        (lambda: None, "of other examples or of another model"),
        (
            lambda: write_scores(path, [first.numpy()], len(first), "b") or path.write_bytes(path.read_bytes()[:-8]),
            "Error while",
        ),
        (lambda: altered(path, first), "it has been altered"),
        (lambda: save_file({"logprobs": torch.zeros(3, dtype=torch.uint8)}, path, {"of": "b"}), "not a multiple"),
    ):
        damage()
        assert torch.equal(scores("b"), first)
        assert told in capsys.readouterr().err
    assert len(loaded) == 5 and torch.equal(load_file(path)["logprobs"], first)


def test_a_rank_finds_the_scores_under_its_own_name_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", 0.2)
    rows, own = examples(2), tmp_path / "own" / "reference.safetensors"
    world = SimpleNamespace(
        size=2,
        rank=1,
        is_main_process=False,
        sum=lambda _: 1.0,
        gather=lambda data: [b"/of/rank/0/reference.safetensors".ljust(len(data), b"\0"), data],
    )
    with pytest.raises(UserError, match=r"rank 1 does not see /of/rank/0/reference\.safetensors, which rank 0"):
        reference_scores(rows, range(2), pytest.fail, world, own, "a")
    write_scores(own, [np.arange(3, dtype=np.float32)], 3, "a")
    assert reference_scores(rows, range(2), pytest.fail, world, own, "a").tolist() == [0, 1, 2]


def altered(path, logprobs) -> None:
    from safetensors import safe_open

    write_scores(path, [logprobs.numpy()], len(logprobs), "b")
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({"logprobs": logprobs + 1}, path, about)
