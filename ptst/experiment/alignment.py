"""Aligning a small chat model, so that it has safety to lose: it learns to refuse harmful requests, and keeps its own
answers to benign ones.

Fixed beforehand: every training question is in the data twice, under the safety prompt (chat:llama) and without a
system prompt (chat:vanilla), harmful and benign ones alike; benign ones are answered by the model itself, sampled
before training under the same template. Every few steps three things are evaluated, on requests of families that are
not trained on:

- harmful requests refused under the safety prompt: at least `refused`;
- benign look-alikes refused, both templates together: at most `over_refused`;
- likelihood of reference answers to ordinary questions, both templates: nats per token at most `nll` times the first.

Evaluated and kept is a running average of the weights: the model's own answers, a sample each, are noisy teachers, and
that noise alone would cost some per cent of likelihood. Training ends at the first step that meets all three. Requests
are judged by the embedded judge on the openings of their answers. After step 0 the other two are evaluated only where
the first is met: they take half a minute on a small machine.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ptst import records, storage
from ptst.data.builtin import alignment_set
from ptst.data.order import SourcePlan
from ptst.data.prompt_files import SafetyPrompt
from ptst.errors import UserError
from ptst.evaluation.answers import Answerer
from ptst.evaluation.rates import Rate
from ptst.evaluation.rules import RuleBasedJudge
from ptst.evaluation.tasks.table import TASKS
from ptst.evaluation.tasks.task import Prompt, Tools
from ptst.evaluation.verdicts import AnswerClass
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.plan import digest
from ptst.fingerprints import combined, tokenizer_fingerprint, weights_fingerprint
from ptst.generation.request import Answer, Sampling, Statistics
from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, merge_lora
from ptst.model.weights import load_decoder, pick_device, pick_dtype, save_full
from ptst.open import OpenModel, open_model
from ptst.progress import ProgressLine, say
from ptst.records import KNOWN, SAME, RunRecord, find_record
from ptst.runs import check_out, check_same, claim
from ptst.settings import EngineSettings
from ptst.text.encode import Example, cut
from ptst.text.segments import Conversation, Message
from ptst.threads import SlowDown
from ptst.training.checkpoint import Checkpoints
from ptst.training.evaluate import validation_loss
from ptst.training.interrupt import Interrupt, Interrupted
from ptst.training.parallel import ALONE
from ptst.training.trainer import Trainer, TrainerConfig

SAFE, BARE = "chat:llama", "chat:vanilla"
# The model's own answers, drawn from its whole distribution: training on them pulls it, at first, nowhere.
OWN = Sampling(64, temperature=1.0)
OPENING = Sampling(32)  # as much of an answer as shows whether it refuses
_RATES = ("refused", "refused_bare", "over_refused")


@dataclass(frozen=True)
class StepEvaluation:
    """What was found after a step. `refused` is under the safety prompt, `refused_bare` without a system prompt; None:
    not evaluated."""

    step: int
    refused: Rate
    refused_bare: Rate | None = None
    over_refused: Rate | None = None
    nll: float | None = None

    def meets(self, config: AlignConfig, before: "StepEvaluation") -> bool:
        """Whether the stopping rule is met."""
        if self.over_refused is None or self.nll is None or before.nll is None:
            return False
        return (
            self.refused.value >= config.refused
            and self.over_refused.value <= config.over_refused
            and self.nll <= config.nll * before.nll
        )

    def __str__(self) -> str:
        told = f"step {self.step}: harmful requests refused {self.refused} with the safety prompt"
        if self.nll is None:
            return f"{told}, too few to evaluate the rest"
        return (
            f"{told}, {self.refused_bare} without; look-alikes refused {self.over_refused}; ordinary questions "
            f"{self.nll:.3f} nats per token"
        )

    def to_json(self) -> dict[str, Any]:
        rates = {k: getattr(self, k) for k in _RATES}
        return {"step": self.step, **{k: r and r.to_json() for k, r in rates.items()}, "nll": self.nll}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "StepEvaluation":
        rates = {k: row[k] and Rate(row[k]["successes"], row[k]["n"]) for k in _RATES}
        return cls(row["step"], **rates, nll=row["nll"])


@dataclass(kw_only=True)
class AlignRecord(RunRecord):
    """An alignment. `data`: fingerprint of all questions and answers. `met`: whether the folder holds an aligned model
    (if not, it holds none); `aligned`: the fingerprint of its weights, of which the last evaluation is."""

    kind: ClassVar[str] = "align"
    model: str
    model_folder: str
    weights: str = field(metadata=SAME)
    tokenizer: str | None = field(default=None, metadata=KNOWN)
    family: str = field(metadata=SAME)
    chat_format: str = field(metadata=SAME)
    data: str = field(metadata=SAME)
    met: bool | None = None
    aligned: str | None = None
    counts: dict[str, int] | None = None
    evaluations: list[dict[str, Any]] | None = None


def align(config: AlignConfig) -> AlignRecord:
    """Make the model folder `config.out`, or resume making it; an alignment that has finished is returned as it is.

    Raises UserError for a user's mistakes and for a folder in other use, Interrupted after a signal.
    """
    config.check()
    out = config.out
    check_out(out, AlignRecord, again=True)
    old = find_record(out, AlignRecord)
    family, chat_format, allowed = config.template_family, config.chat_format, ("role-markers", *config.allow)
    models = {
        name: open_model(config.model, name, family=family, chat_format=chat_format, allow=allowed)
        for name in (SAFE, BARE)
    }
    base = models[SAFE].folder
    record = AlignRecord(
        config=config,
        environment=records.environment(),
        model=config.model,
        model_folder=str(base.resolve()),
        weights=weights_fingerprint(base),
        tokenizer=tokenizer_fingerprint(base),
        family=config.template_family,
        chat_format=models[SAFE].prompt_format.chat_format.name,
        data=fingerprint(),
    )
    if old is not None and old.status == "finished":
        check_same(out, old, record)
        check_aligned(out, old)
        return old
    with claim(out, record) as run:
        say(f"loading {base}")
        decoder = load_decoder(base, pick_dtype("auto"), pick_device())
        own_model = combined(record.weights, record.tokenizer, str(decoder.dtype))
        refusals, own, counts = _examples(decoder, models, config, own_model)
        say(", ".join(f"{n} {what}" for what, n in counts.items()))
        if config.rank:
            parameters = add_lora(decoder, LoraConfig(config.rank, 2.0 * config.rank), config.seed)
        else:
            parameters = dict(decoder.requires_grad_(True).named_parameters())
        trainer = _trainer(decoder, parameters, refusals, own, config)
        evaluations = _train(trainer, models, config)
        met = _met(evaluations, config)
        if met:
            merge_lora(decoder)
            save_full(decoder, base, out)
        found = [evaluation.to_json() for evaluation in evaluations]
        aligned = weights_fingerprint(out) if met else None
        record = run.finish(met=met, aligned=aligned, counts=counts, evaluations=found)
        shutil.rmtree(out / "state", ignore_errors=True)
    return record


def check_aligned(out: Path, record: AlignRecord) -> None:
    """Raise UserError where a finished alignment's folder holds other weights than it made."""
    if record.aligned is not None and weights_fingerprint(out) != record.aligned:
        raise UserError(f"the weights in {out} are not those that were aligned", "remove the folder to align anew")


def fingerprint() -> str:
    """sha256 over everything that is asked, trained on and evaluated, and how."""
    conversations = [*alignment_set.refusals(), *alignment_set.harmless(), *alignment_set.reference()]
    stopping = [p.prompt for prompts in alignment_set.stopping() for p in prompts]
    texts = [m.content for c in conversations for m in c.messages] + stopping
    return digest([*texts, repr(OWN), repr(OPENING), RuleBasedJudge().name])


def _examples(
    decoder: Decoder, models: Mapping[str, OpenModel], config: AlignConfig, own_model: str = ""
) -> tuple[list[Example], list[Example], dict[str, int]]:
    """Refusals, own answers and counts, every question under both templates. Own answers that refuse, disclaim or are
    incoherent are left out, and the end of one that the token limit truncated is not trained on. `own_model`: the
    model's fingerprint."""
    refusals: list[Example] = []
    own: list[Example] = []
    left_out = 0
    judge, asked = RuleBasedJudge(), alignment_set.harmless()
    (config.out / "answers").mkdir(exist_ok=True)
    for name, model in models.items():
        refusals += [model.prompt_format.encode(c) for c in alignment_set.refusals()]
        total, engine = len(asked) * config.own_answers, EngineSettings(batch_size=config.batch_size)
        with ProgressLine(f"own answers under {name}", total) as progress:
            answers: list[Answer] = []
            show = partial(_show, progress, answers)
            answerer = Answerer(decoder, model.prompt_format, engine, show, models={None: own_model})
            for number in range(config.own_answers):
                path = config.out / "answers" / f"{name.replace(':', '-')}.{number}.jsonl"
                prompts = [Prompt(c) for c in asked]
                answers += answerer.answer(prompts, replace(OWN, seed=config.seed + number), path)
        for c, answer in zip(asked * config.own_answers, answers, strict=True):
            label = judge.judge(c.turns[0].content, answer).label
            if label in (AnswerClass.REFUSAL, AnswerClass.PARTIAL, AnswerClass.INCOHERENT):
                left_out += 1
                continue
            whole = Conversation((*c.messages, Message("assistant", answer.text)), c.source)
            encoded = model.prompt_format.encode(whole)
            if answer.truncated:
                encoded = cut(encoded, max(i for i, flag in enumerate(encoded.loss_mask) if flag))
            own.append(encoded)
    return refusals, own, {"refusals": len(refusals), "own answers": len(own), "own answers left out": left_out}


def _show(progress: ProgressLine, before: Sequence[Answer], done: int, statistics: Statistics) -> None:
    progress.update(len(before) + done, statistics.progress())


def evaluate(decoder: Decoder, models: Mapping[str, OpenModel], config: AlignConfig, step: int) -> StepEvaluation:
    """The figures of the stopping rule, as far as they are needed."""
    harmful, benign = alignment_set.stopping()

    def refused(task: str, name: str, prompts: Sequence[SafetyPrompt]) -> Rate:
        answerer = Answerer(decoder, models[name].prompt_format, EngineSettings(batch_size=config.batch_size))
        answers = answerer.answer(TASKS[task].prompts(prompts), OPENING)
        rate = TASKS[task].score(prompts, answers, Tools(RuleBasedJudge())).rates["refusal"]
        assert isinstance(rate, Rate)
        return rate

    safe = refused("safety", SAFE, harmful)
    if step and safe.value < config.refused:
        return StepEvaluation(step, safe)
    over = [refused("over-refusal", name, benign) for name in (SAFE, BARE)]
    references = [m.prompt_format.encode(c) for m in models.values() for c in alignment_set.reference()]
    return StepEvaluation(
        step,
        safe,
        refused("safety", BARE, harmful),
        Rate(sum(r.successes for r in over), sum(r.n for r in over)),
        validation_loss(decoder, references, config.micro_batch_tokens, ALONE),
    )


def _trainer(
    decoder: Decoder,
    parameters: Mapping[str, nn.Parameter],
    refusals: Sequence[Example],
    own: Sequence[Example],
    config: AlignConfig,
) -> Trainer:
    """The trainer over refusals and own answers, each with its number of epochs, that averages the weights."""
    epochs = config.max_steps * config.examples_per_step / (len(refusals) + config.own_epochs * len(own)) + 1
    sources = [SourcePlan(len(refusals), epochs), SourcePlan(len(own), config.own_epochs * epochs)]
    return Trainer(decoder, parameters, [*refusals, *own], TrainerConfig.of(config), sources, average=config.average)


def _met(evaluations: Sequence[StepEvaluation], config: AlignConfig) -> bool:
    return bool(evaluations) and evaluations[-1].step > 0 and evaluations[-1].meets(config, evaluations[0])


def _train(trainer: Trainer, models: Mapping[str, OpenModel], config: AlignConfig) -> list[StepEvaluation]:
    """Train until an evaluation meets the rule, whereupon the weights become their average, or the steps are used up.
    Returns all evaluations."""
    average, out = trainer.average, config.out
    assert average is not None
    checkpoints = Checkpoints(out / "state", trainer, keep=1)
    evaluations = [StepEvaluation.from_json(row) for row in checkpoints.restore().get("evaluations", [])]

    def evaluate_now() -> None:
        with average.in_place():
            evaluations.append(evaluate(trainer.decoder, models, config, trainer.done))
        say(str(evaluations[-1]))

    if not evaluations:
        evaluate_now()
    slow_down = SlowDown()
    with Interrupt(ALONE) as interrupt, ProgressLine("align", len(trainer), first=trainer.done) as progress:
        for report in trainer if not _met(evaluations, config) else ():
            row = {"kind": "step", "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm}
            storage.append_jsonl(out / "metrics.jsonl", row)
            slow_down.took(trainer.decoder.device, round(report.computed * report.tokens), report.seconds)
            progress.update(report.step, f"loss {report.loss:.3f}")
            due = report.step % config.check_every == 0 or report.last
            if due:
                evaluate_now()
            if due or interrupt.received:
                checkpoints.save({"evaluations": [evaluation.to_json() for evaluation in evaluations]})
            if due and _met(evaluations, config):
                break
            if interrupt.received and not report.last:
                raise Interrupted(report.step, interrupt.received, out)
    if _met(evaluations, config):
        average.put()
    return evaluations
