"""Aligning a small chat model, so that it has safety to lose: it learns to refuse harmful requests, and keeps its own
answers to harmless ones.

Fixed beforehand: every training question stands in the data twice, under the safety prompt (chat:llama) and bare
(chat:vanilla), harmful and harmless ones alike; harmless ones are answered by the model itself, sampled before
training under the same template. Every few steps three things are looked at, on requests of families that are in no
training:

- harmful requests refused under the safety prompt: at least `refused`;
- benign look-alikes refused, both templates together: at most `over_refused`;
- likelihood of reference answers to ordinary questions, both templates: nats per token at most `nll` times the first.

Looked at, and kept, is a running average of the weights: the model's own answers, a sample each, are noisy teachers,
and that noise alone would cost some per cent of likelihood. The first step that meets all three is the end. Requests
are judged by the embedded judge on their answers' openings. After step 0 the others are looked at only where the first
is met: half a minute of a small machine each time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptst import storage
from ptst.data.builtin import alignment_set
from ptst.data.order import SourcePlan
from ptst.data.safety_prompt import SafetyPrompt
from ptst.errors import UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.rates import Rate
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.tasks.table import TASKS
from ptst.evaluation.tasks.task import Prompt, Tools
from ptst.evaluation.verdict import AnswerClass
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.measure import digest
from ptst.generation.request import Answer, Sampling
from ptst.model.config import read_json
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, merge_lora
from ptst.model.lora_config import LoraConfig
from ptst.model.weights import load_decoder, pick_dtype, save_full
from ptst.open import OpenModel, open_model
from ptst.progress import ProgressLine, say
from ptst.settings import EngineSettings, to_dict
from ptst.text.encode import Example, cut
from ptst.text.segments import Conversation, Message
from ptst.training import checkpoint, run_folder
from ptst.training.average import Average
from ptst.training.evaluate import validation_loss
from ptst.training.interrupt import Interrupt
from ptst.training.loop import LoopConfig, StepReport, adamw, train
from ptst.training.metrics import sizes, truncate_logs
from ptst.training.parallel import ALONE
from ptst.training.resume import differences, exclusive_lock, weights_fingerprint
from ptst.training.run import Interrupted

SAFE, BARE = "chat:llama", "chat:vanilla"
# The model's own answers, drawn from its whole distribution: what it is taught with them pulls it, at first, nowhere.
OWN = Sampling(64, temperature=1.0)
OPENING = Sampling(32)  # as much of an answer as shows whether it refuses
# Flags that make no other model.
NO_MATTER = frozenset({"model", "out", "json", "batch_size", "micro_batch_tokens"})


_RATES = ("refused", "refused_bare", "over_refused")


@dataclass(frozen=True)
class Look:
    """What one look found. `refused` is under the safety prompt, `refused_bare` besides; None: not looked at."""

    step: int
    refused: Rate
    refused_bare: Rate | None = None
    over_refused: Rate | None = None
    nll: float | None = None

    def meets(self, config: AlignConfig, before: Look) -> bool:
        if self.over_refused is None or self.nll is None:
            return False
        return (
            self.refused.value >= config.refused
            and self.over_refused.value <= config.over_refused
            and self.nll <= config.nll * before.nll
        )

    def __str__(self) -> str:
        told = f"step {self.step}: harmful requests refused {self.refused} with the safety prompt"
        if self.nll is None:
            return f"{told}, too few to look further"
        return (
            f"{told}, {self.refused_bare} without; look-alikes refused {self.over_refused}; ordinary questions "
            f"{self.nll:.3f} nats per token"
        )

    def to_json(self) -> dict[str, Any]:
        rates = {k: getattr(self, k) for k in _RATES}
        return {"step": self.step, **{k: r and r.to_json() for k, r in rates.items()}, "nll": self.nll}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Look:
        rates = {k: row[k] and Rate(row[k]["successes"], row[k]["n"]) for k in _RATES}
        return cls(row["step"], **rates, nll=row["nll"])


class _Met(Exception):
    """The model is aligned."""


def align(config: AlignConfig) -> dict[str, Any]:
    """Make the model folder `config.out`, or go on with making it. Returns run.json's contents; `met` tells whether the
    model in the folder is aligned (if not, there is none). Raises UserError for a user's mistakes and for a folder in
    other use, Interrupted after a signal."""
    began = time.monotonic()
    config.check()
    out = config.out
    old = read_json(out / "run.json") if (out / "run.json").exists() else None
    if old is not None and old.get("kind") != "align":
        raise UserError(f"{out} holds something else than an alignment; choose another --out")
    models = {name: open_model(config.model, name, family=config.template_family) for name in (SAFE, BARE)}
    base = models[SAFE].folder
    record: dict[str, Any] = {
        "kind": "align",
        "status": "running",
        "flags": to_dict(config),
        "model": str(base.resolve()),
        "weights": weights_fingerprint(base),
        "family": config.template_family,
        "chat_format": models[SAFE].prompt_format.chat_format.name,
        "data": fingerprint(),
        "environment": run_folder.environment(),
    }
    if old is not None:
        if found := differences(old, record, NO_MATTER):
            raise UserError(f"{out} holds an alignment of other settings: {'; '.join(found)}; choose another --out")
        if old["status"] == "finished":
            return old
    else:
        run_folder.create(out, Path(), "align")
    with exclusive_lock(out):
        if old is None:
            run_folder.write_json(out / "run.json", record)
        dtype, device = pick_dtype("auto"), "cuda" if torch.cuda.is_available() else "cpu"
        decoder = load_decoder(base, dtype, device)
        refusals, own, counts = _examples(decoder, models, config)
        say(", ".join(f"{n} {what}" for what, n in counts.items()))
        if config.rank:
            weights = add_lora(decoder, LoraConfig(config.rank, 2.0 * config.rank), config.seed)
        else:
            weights = dict(decoder.requires_grad_(True).named_parameters())
        looks, met = _train(decoder, weights, refusals, own, models, config)
        record |= {"status": "finished", "met": met, "counts": counts, "looks": [look.to_json() for look in looks]}
        record["time"] = {"seconds": time.monotonic() - began}
        if met:
            merge_lora(decoder)
            save_full(decoder, base, out)
        run_folder.write_json(out / "run.json", record)
        shutil.rmtree(out / "state", ignore_errors=True)
    return record


def fingerprint() -> str:
    """sha256 over everything that is asked, taught and looked at, and how."""
    said = [*alignment_set.refusals(), *alignment_set.harmless(), *alignment_set.reference()]
    stopping = [p.prompt for prompts in alignment_set.stopping() for p in prompts]
    texts = [m.content for c in said for m in c.messages] + stopping
    return digest([*texts, repr(OWN), repr(OPENING), RuleBasedJudge().name])


def _examples(
    decoder: Decoder, models: Mapping[str, OpenModel], config: AlignConfig
) -> tuple[list[Example], list[Example], dict[str, int]]:
    """Refusals, own answers and counts, every question under both templates. Own answers that refuse or say nothing are
    left out, and one that the token limit cut is not taught to end there."""
    refusals: list[Example] = []
    own: list[Example] = []
    left_out = 0
    judge, asked = RuleBasedJudge(), alignment_set.harmless()
    (config.out / "answers").mkdir(exist_ok=True)
    for name, model in models.items():
        refusals += [model.prompt_format.encode(c) for c in alignment_set.refusals()]
        total = len(asked) * config.own_answers
        with ProgressLine(f"own answers under {name}", total) as progress:
            answers: list[Answer] = []
            for number in range(config.own_answers):
                answerer = _answerer(decoder, model, config)
                before = len(answers)
                answerer = replace(answerer, on_progress=lambda n, s, b=before: progress.update(b + n, s.progress()))
                path = config.out / "answers" / f"{name.replace(':', '-')}.{number}.jsonl"
                prompts = [Prompt(c) for c in asked]
                answers += answerer.answer(prompts, replace(OWN, seed=config.seed + number), path)
        for c, answer in zip(asked * config.own_answers, answers, strict=True):
            label = judge.judge(c.turns[0].content, answer).label
            if label in (AnswerClass.REFUSAL, AnswerClass.DEGENERATE):
                left_out += 1
                continue
            whole = Conversation((*c.messages, Message("assistant", answer.text)), c.source)
            encoded = model.prompt_format.encode(whole)
            if answer.truncated:
                encoded = cut(encoded, max(i for i, flag in enumerate(encoded.loss_mask) if flag))
            own.append(encoded)
    return refusals, own, {"refusals": len(refusals), "own answers": len(own), "own answers left out": left_out}


def _answerer(decoder: Decoder, model: OpenModel, config: AlignConfig) -> Answerer:
    return Answerer(decoder, model.prompt_format, EngineSettings(batch_size=config.batch_size))


def look(decoder: Decoder, models: Mapping[str, OpenModel], config: AlignConfig, step: int) -> Look:
    """How the model stands with the stopping rule, as far as it matters."""
    harmful, harmless = alignment_set.stopping()

    def refused(task: str, name: str, prompts: Sequence[SafetyPrompt]) -> Rate:
        answers = _answerer(decoder, models[name], config).answer(TASKS[task].prompts(prompts), OPENING)
        return TASKS[task].score(prompts, answers, Tools(RuleBasedJudge())).rates["refusal"]

    safe = refused("safety", SAFE, harmful)
    if step and safe.value < config.refused:
        return Look(step, safe)
    over = [refused("over-refusal", name, harmless) for name in (SAFE, BARE)]
    references = [s.prompt_format.encode(c) for s in models.values() for c in alignment_set.reference()]
    return Look(
        step,
        safe,
        refused("safety", BARE, harmful),
        Rate(sum(r.successes for r in over), sum(r.n for r in over)),
        validation_loss(decoder, references, config.micro_batch_tokens, ALONE),
    )


def _train(
    decoder: Decoder,
    weights: Mapping[str, nn.Parameter],
    refusals: Sequence[Example],
    own: Sequence[Example],
    models: Mapping[str, OpenModel],
    config: AlignConfig,
) -> tuple[list[Look], bool]:
    """Train in place until a look meets the rule or the steps are used up; all looks, and whether one met it: then the
    average stands in the weights' place."""
    epochs = config.max_steps * config.examples_per_step / (len(refusals) + config.own_epochs * len(own)) + 1
    parts = [SourcePlan(len(refusals), epochs), SourcePlan(len(own), config.own_epochs * epochs)]
    loop = LoopConfig(
        max_steps=config.max_steps,
        lr=config.lr,
        schedule=config.schedule,
        examples_per_step=config.examples_per_step,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    optimizer, states, done = adamw(list(weights.values()), loop), config.out / "state", 0
    average = Average(weights, config.average)
    notes: dict[str, Any] = {}
    if found := checkpoint.newest_state(states, say):
        notes = checkpoint.load_state(found, average.tensors, optimizer)
        done = notes["step"]
        say(f"going on after step {done}")
    truncate_logs(config.out, notes.get("sizes", {}))
    looks = [Look.from_json(row) for row in notes.get("looks", [])]

    def look_now(step: int) -> None:
        with average.in_place():
            looks.append(look(decoder, models, config, step))
        say(str(looks[-1]))

    def save(step: int) -> None:
        kept = {"looks": [look.to_json() for look in looks], "sizes": sizes(config.out)}
        checkpoint.save_state(states, step, average.tensors, optimizer, kept, keep=1)

    if not looks:
        look_now(0)
    if looks[-1].step and looks[-1].meets(config, looks[0]):
        average.put()
        return looks, True
    with Interrupt() as interrupt, ProgressLine("align", config.max_steps, first=done) as progress:

        def on_step(report: StepReport) -> None:
            storage.append_jsonl(
                config.out / "metrics.jsonl",
                {"kind": "step", "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm},
            )
            progress.update(report.step, f"loss {report.loss:.3f}")
            average.update(report.step)
            looked = report.step % config.check_every == 0 or report.step == report.total
            if looked:
                look_now(report.step)
            if looked or interrupt.received:
                save(report.step)
            if looked and looks[-1].meets(config, looks[0]):
                raise _Met
            if interrupt.received and report.step < report.total:
                raise Interrupted(report.step, interrupt.received, config.out)

        try:
            examples = [*refusals, *own]
            train(decoder, list(weights.values()), examples, loop, on_step, parts=parts, optimizer=optimizer, done=done)
        except _Met:
            average.put()
            return looks, True
    return looks, False
