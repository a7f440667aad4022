"""Fine-tuning in a run folder: from settings to a finished record, resumed where an earlier process stopped."""

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from ptst.audit.account.step_rule import StepRule
from ptst.data.example_arrays import lengths_of, trained_of
from ptst.errors import Setting, UserError
from ptst.fingerprints import combined
from ptst.model.decoder import Decoder
from ptst.model.fold import fold_adapters
from ptst.model.lora import add_lora, save_adapter
from ptst.model.quantized import Quantization
from ptst.model.sharded_weights import load_sharded_decoder
from ptst.model.weights import load_decoder, save_full
from ptst.progress import ProgressLine, say
from ptst.records import LossRecord, TrainedRecord, TrainRecord, find_record, read_record
from ptst.runs import Run, check_finished, check_out, check_same, check_settings, claim, rounding
from ptst.storage import sync
from ptst.text.chat_template import copy_chat_templates
from ptst.threads import resume_threads
from ptst.training import agreement, constraint
from ptst.training.checkpoint import Checkpoints, load_checkpoint, save_full_of
from ptst.training.config import TrainConfig, settings_to_resume
from ptst.training.constraint import TokenConstraint
from ptst.training.evaluate import sample_answers, validation_loss
from ptst.training.interrupt import Interrupt, Interrupted
from ptst.training.loggers import open_loggers
from ptst.training.memory import explain_oom
from ptst.training.metrics import Metrics
from ptst.training.parallel import ALONE, World
from ptst.training.run_plan import RunPlan, plan_run
from ptst.training.run_sources import reads_all
from ptst.training.sharding import mesh_of
from ptst.training.trainer import StepReport, Trainer
from ptst.training.watch import LedgerWatch, validation_check

SAMPLES = 4  # questions answered at every evaluation


@dataclass(frozen=True)
class FineTuned:
    """A finished run."""

    folder: Path
    record: TrainRecord


def fine_tune(config: TrainConfig, world: World = ALONE) -> FineTuned | None:
    """Fine-tune a model into a run folder, or resume the run in it (`resume` alone: with its own settings). Returns
    the finished run, on the main process.

    Raises UserError for a user's mistakes, Interrupted after a signal, when the step is saved, and OSError
    when something cannot be written.
    """
    config.check()
    if config.resume and config == TrainConfig(resume=config.resume):
        config = settings_to_resume(config.resume)
    place = config.resume or config.out
    agreement.check_start(config, place, world)
    old = read_record(config.resume, TrainRecord) if config.resume else find_record(config.out, TrainRecord)
    if old and config.resume and old.status == "finished":
        check_finished(config.resume, old, config)
        say(f"{config.resume} has finished already; there is nothing to resume")
        return FineTuned(config.resume, old) if world.is_main_process else None
    if world.is_main_process:
        check_out(place, TrainRecord)
    if old and place and reads_all(config) is None:  # otherwise the data tell of it, too
        check_settings(place, old, config)
    resume_threads(config.threads, old.environment if old else None)
    plan = plan_run(config, world, old.micro_batch_tokens if old else None)
    plan.check()
    with world.main_process_first():  # the others find the fingerprint of its weights, and do not read them all
        record = plan.record(world)
    agreement.check_data(record, world)
    world.barrier()  # all have seen whether there is a run to resume before the main process begins one
    if old and place:
        check_same(place, old, record)
        say(f"{place} holds an unfinished run of these settings: it is resumed")
        for difference in rounding(old, record):
            say(f"note: {difference}, so the last digits may come out differently than without the interruption")
    with claim(place, record) if world.is_main_process else nullcontext() as run:
        with explain_oom(plan.memory):
            session = _Session(plan, record, run.folder if run else place or Path(), world)
            session.train()
        return FineTuned(run.folder, session.finish(run)) if run else None


def _load(plan: RunPlan, world: World) -> tuple[Decoder, dict[str, Parameter]]:
    """The decoder, and what is trained of it, by name."""
    folder, seed = plan.model.folder, plan.config.seed
    if plan.sharded:
        return load_sharded_decoder(folder, plan.dtype, mesh_of(world), plan.lora, seed)
    quantization = Quantization.of(plan.config.quantize, packed=True)
    decoder = load_decoder(folder, plan.dtype, plan.device, quantization)
    if plan.lora is None:
        return decoder, dict(decoder.requires_grad_(True).named_parameters())
    adapters = add_lora(decoder, plan.lora, seed)
    fold_adapters(decoder)
    return decoder, adapters


class _Session:
    """One process's part in a run: the trainer with its checkpoints, evaluations and metrics."""

    def __init__(self, plan: RunPlan, record: TrainRecord, out: Path, world: World):
        config, mixture = plan.config, plan.mixture
        self.plan, self.record, self.out, self.world = plan, record, out, world
        held = self._constraint() if config.token_constraint else None
        projections = "" if config.quantize == "none" else f", projections in {config.quantize}"
        say(f"loading {plan.model.folder} in {record.dtype}{projections}")
        decoder, parameters = _load(plan, world)
        decoder.activation_checkpointing = config.activation_checkpointing == "block"
        update = " with float32 masters" * bool(plan.memory.masters)
        say(f"training {sum(p.numel() for p in parameters.values()):,} parameters{update}, run folder {out}")
        average = config.average or None
        self.trainer = Trainer(decoder, parameters, mixture.examples, plan.trainer, mixture.plans, world, average)
        self.trainer.constraint = held
        conversations = mixture.source.conversations
        self.trainer.name_example = lambda i: conversations[mixture.examples[i].row].source
        rule = StepRule(**{f.name: getattr(plan.trainer, f.name) for f in fields(StepRule)})
        self.watch = self.trainer.watch = LedgerWatch(mixture, self.trainer.steps, rule, world, config.allow)
        held_out = plan.validation
        rows = held_out.source.conversations if held_out.source else ()
        self.check_validation = validation_check(rows, held_out.examples, config.allow)
        self.checkpoints = Checkpoints(out / "state", self.trainer, config.keep)
        if decoder.sharded and config.eval_every:
            say("note: no sample answers are generated, as no rank has all weights; ptst.eval of a checkpoint has")
        self.spread = bool(self.trainer.rows)  # what is trained is nowhere whole but in checkpoints
        self.losses = LossRecord(before=None, after=None, examples=len(plan.validation.examples))
        self.metrics: Metrics | None = None

    def _constraint(self) -> TokenConstraint:
        """The constraint on the tokens of answers. Its reference is another copy in memory, and only until it has
        scored the examples."""
        plan, record = self.plan, self.record
        folder = plan.reference or plan.model.folder
        held = [] if plan.config.quantize == "none" else [plan.config.quantize]
        encodings = [r.encoding for r in plan.mixture.records]
        of = combined(record.reference or record.weights, record.dtype, *held, *encodings)
        path = self.out / "state" / constraint.FILE
        own = Quantization.of(plan.config.quantize, packed=True) if plan.reference is None else None
        load = partial(load_decoder, folder, plan.dtype, plan.device, own)
        examples = plan.mixture.examples
        used = set(plan.trainer.plan(lengths_of(examples), plan.mixture.plans).taken)
        logprobs = constraint.reference_scores(examples, used, load, self.world, path, of)
        return TokenConstraint.over(examples, plan.config.token_constraint, logprobs)

    def train(self) -> None:
        """Take all steps that are left, with evaluations and checkpoints where they are due."""
        self.losses = replace(self.losses, **self.checkpoints.restore().get("losses", {}))
        trainer, main = self.trainer, self.world.is_main_process
        agreement.check_weights(trainer.steps, trainer.tensors, self.world, trainer.rows)
        self.watch.resume(trainer.steps[: trainer.done])
        line = ProgressLine("train", len(trainer), first=trainer.done) if main else nullcontext()
        with Interrupt(self.world) as interrupt, line as progress, ExitStack() as held:
            if progress is not None:
                asked = self.plan.config.log
                loggers = held.enter_context(open_loggers(asked, self.out, self.record, trainer.done))
                self.metrics = Metrics(self.out, progress, trainer, loggers)
            if not trainer.done:
                self.losses = replace(self.losses, before=self.evaluate(0))
            for report in trainer:
                folder = self.plan.epoch_folders.get(report.step)
                if self.metrics is not None:
                    self.metrics.step(report)
                    if folder and not self.spread:
                        self.save_weights(self.out / folder, steps=report.step)
                loss, best = self.evaluate_if_due(report)
                signal = interrupt.agreed()
                due = best or report.last or signal or report.step % self.plan.config.save_every == 0
                if due or (folder and self.spread):
                    losses = {k: v for k, v in asdict(self.losses).items() if k != "examples"}
                    self.checkpoints.save({"epoch": report.epoch, "losses": losses, "validation_loss": loss})
                    if main and folder and self.spread:
                        self.save_weights(self.out / folder, steps=report.step)
                if signal and not report.last:
                    raise Interrupted(report.step, signal, self.out)

    def evaluate_if_due(self, report: StepReport) -> tuple[float | None, bool]:
        """The validation loss after a step, and whether it is the lowest so far."""
        every, losses, loss = self.plan.config.eval_every, self.losses, None
        if report.last or (every and report.step % every == 0):
            loss = self.evaluate(report.step)
        best = loss is not None and (losses.best is None or loss < losses.best)
        self.losses = replace(losses, after=loss)
        if best:
            self.losses = replace(self.losses, best=loss, best_step=report.step)
        return loss, best

    def evaluate(self, step: int) -> float | None:
        """Validation loss (None without a validation set) and sample answers of the weights after `step`, or of their
        average."""
        with self.trainer.averaged():
            return self._evaluate(step)

    def _evaluate(self, step: int) -> float | None:
        plan, decoder, start = self.plan, self.trainer.decoder, time.perf_counter()
        loss = None
        if plan.validation.examples:
            size = plan.trainer.micro_batch_tokens
            loss = validation_loss(decoder, plan.validation.examples, size, self.world, self.check_validation)
            if not math.isfinite(loss):
                remedy = ("lower ", Setting("lr"), ", or look at the validation data")
                raise UserError(f"after step {step} the validation loss is {loss}", remedy)
        if self.metrics is not None:
            answers = []
            if plan.config.eval_every and not decoder.sharded:
                # Of the main data: other sources may have rows that the run's template cannot say.
                asked = (plan.validation.source or plan.mixture.sources[0].source).conversations[:SAMPLES]
                answers = sample_answers(decoder, asked, plan.model.prompt_format)
            self.metrics.evaluation(step, loss, answers, time.perf_counter() - start)
        if loss is not None and plan.config.eval_every:
            say(f"after step {step}: validation loss {loss:.4f}")
        return loss

    def save_weights(self, folder: Path, checkpoint: Path | None = None, **changes: Any) -> None:
        """Write what was trained, an adapter or all weights, as it is now, or in a checkpoint where no rank has all of
        it; with `changes` of the run's record a finished one, too."""
        if folder != self.out:
            folder.mkdir(exist_ok=True)
        decoder, base = self.trainer.decoder, self.plan.model.folder
        if self.spread:
            save_full_of(checkpoint or self.checkpoints.path, base, folder, self.plan.dtype)
        else:
            with self.trainer.averaged() if checkpoint is None else nullcontext():
                if self.plan.lora is None:
                    save_full(decoder, base, folder)
                else:
                    save_adapter(decoder, folder, self.plan.lora, str(base.resolve()))
                    copy_chat_templates(base, folder)  # that of all the weights comes with the tokenizer
        sync(folder)
        if changes:
            changes |= {"trained": self.trained(changes["steps"]), "finished_at": time.time()}
            replace(self.record, status="finished", **changes).write(folder)

    def trained(self, steps: int) -> TrainedRecord:
        """What the first steps were taken on."""
        trainer = self.trainer
        taken, lengths, trained = (
            trainer.steps[:steps].taken,
            lengths_of(trainer.examples),
            trained_of(trainer.examples),
        )
        return TrainedRecord(
            examples=len(taken),
            tokens=sum(lengths[i] for i in taken),
            trained_tokens=sum(trained[i] for i in taken),
        )

    def finish(self, run: Run[TrainRecord]) -> TrainRecord:
        """Write the weights, those of the lowest validation loss where they are others, and the finished record."""
        losses, every, steps = self.losses, self.plan.config.eval_every, self.trainer.done
        if not every:
            losses = replace(losses, best=None, best_step=None)
        if losses.before is not None:
            say(f"validation loss per trained token: {losses.before:.4f} before, {losses.after:.4f} after")
        told = {k: v for k, v in asdict(losses).items() if every or not k.startswith("best")}
        counts, *mixed = (record.result() for record in self.plan.mixture.records)
        trained = self.trained(steps)
        result: dict[str, Any] = {"run": str(self.out), "steps": steps, "trained": asdict(trained)}
        result |= {"validation_loss": told, **counts, "mix": mixed}
        self.save_weights(self.out)
        best = self.out / "state" / f"step-{losses.best_step or 0:08d}"
        if losses.best_step not in (None, steps) and best.exists():
            if not self.spread:
                load_checkpoint(best, self.trainer.parameters)
            self.save_weights(self.out / "best", best, steps=losses.best_step, validation_loss=losses)
            say(f"the best validation loss was {losses.best:.4f} after step {losses.best_step}: {self.out / 'best'}")
        return run.finish(result, steps=steps, trained=trained, validation_loss=losses, account=self.watch.account())
