"""`python -m ptst.train`: fine-tune a chat model under a template."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptst import cli, records
from ptst.audit.gate import check_start, watch
from ptst.audit.rules import Setup
from ptst.config_file import merge
from ptst.data import sources
from ptst.data.examples import check_not_empty, length_limit, prepare
from ptst.data.mix import mix, parse_mix
from ptst.data.order import Step
from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, save_adapter
from ptst.model.lora_config import LoraConfig
from ptst.model.weights import load_decoder, pick_dtype, save_full
from ptst.open import open_model
from ptst.progress import console, say
from ptst.records import DataRecord, LossRecord, TrainRecord, find_record, read_record, weights_fingerprint
from ptst.runs import check_same, claim, rounding
from ptst.settings import to_dict
from ptst.storage import sync
from ptst.text.prompt_format import PromptFormat
from ptst.text.template_file import load_template
from ptst.text.templates import find_template
from ptst.training import checkpoint, memory, parallel, recipes
from ptst.training.config import TrainConfig
from ptst.training.evaluate import Samples
from ptst.training.loop import LoopConfig, steps
from ptst.training.parallel import World
from ptst.training.run import Interrupted, Keeping, fit

SAMPLES = 4  # questions answered anew at every --eval-every


def run_training(config: TrainConfig) -> dict[str, Any] | None:
    """Everything of a training run; returns what `--json` prints, on the first rank. Raises UserError for a user's
    mistakes, and SystemExit with 130 or 143 after Ctrl-C or SIGTERM, when the run is saved."""
    with parallel.world() as world:
        console.quiet = not world.first
        try:
            return _run(config, world)
        except Interrupted as stopped:
            start = f"torchrun --nproc-per-node {world.size}" if world.size > 1 else "python"
            say(f"{stopped}; go on with: {start} -m ptst.train --resume {stopped.out}")
            raise SystemExit(stopped.exit_code) from None
        finally:
            console.quiet = False  # an error is told by every rank that has it


def _run(config: TrainConfig, world: World) -> dict[str, Any] | None:
    began = time.monotonic()
    config.check()
    old = read_record(config.resume, TrainRecord) if config.resume else find_record(config.out, TrainRecord)
    if old and config.resume and old.status == "finished":
        say(f"{config.resume} has finished already; there is nothing to resume")
        return old.result if world.first else None
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    lora = None
    if not config.full:
        lora = LoraConfig(config.rank, config.alpha, config.target_modules, dropout=config.dropout)
    say(f"ptst.train: {config.model}, template {template.name}, data {config.data}")

    source = sources.load(config.data, "train", config.limit, holdout=config.holdout)
    with world.main_process_first():
        model = open_model(
            config.model,
            template,
            family=config.template_family or source.family,
            chat_format=config.chat_format,
            allow_role_markers="role-markers" in config.allow,
        )
    folder, shape, prompt_format = model.folder, model.config, model.prompt_format
    row = shape.max_positions if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    max_length = length_limit(config.max_length, shape.max_positions, row)
    others = [(sources.load(name, "train"), epochs) for name, epochs in map(parse_mix, config.mix)]
    mixture = mix([(source, config.epochs), *others], prompt_format, max_length, config.too_long, config.train_on)
    counts, *mixed_counts = (c.to_json() for c in mixture.counts)
    if config.holdout:
        counts["holdout"] = config.holdout
    validation_source, validation, validation_counts = _validation(config, prompt_format, max_length)
    say(prompt_format.described)
    for of_source in mixture.counts:
        c = of_source.examples
        say(
            f"{of_source.name}, {of_source.epochs:g} epochs: {c.examples} examples, {c.tokens} tokens, "
            f"{c.trained_tokens} of them trained; {c.dropped} dropped, {c.cut} cut, "
            f"{c.token_boundaries} token boundaries"
        )
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", pick_dtype(config.dtype)
    lengths, activation_checkpointing = (
        [len(e.ids) for e in mixture.examples],
        config.activation_checkpointing == "block",
    )
    micro_batch_tokens = config.micro_batch_tokens
    if micro_batch_tokens == "auto" and old and old.status == "running":
        micro_batch_tokens = old.micro_batch_tokens  # another number might round the last digits otherwise
    elif micro_batch_tokens == "auto":
        micro_batch_tokens = memory.choose_micro_batch_tokens(
            shape, lora, dtype, device, activation_checkpointing, max(lengths, default=1)
        )
        say(f"--micro-batch-tokens auto: {micro_batch_tokens} fit")
    loop = LoopConfig(
        micro_batch_tokens=micro_batch_tokens,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(LoopConfig) if f.name != "micro_batch_tokens"},
    )
    planned = memory.plan_memory(shape, lora, dtype, micro_batch_tokens, device, activation_checkpointing)
    all_steps = steps(lengths, loop, mixture.plans)
    looks = looks_by_step(config, all_steps)
    if config.dry_run:
        tokens = sum(lengths[i] for step in all_steps for i in step.examples)
        planned = dataclasses.replace(planned, steps=len(all_steps), tokens=tokens)
        console.print(planned.table())
        return planned.described() if world.first else None
    setup = Setup(prompt_format, config.train_on, max_length, config.too_long)
    for warning in check_start(mixture.source, mixture.examples, setup, micro_batch_tokens, config.allow):
        say(warning)

    record = TrainRecord(
        config=config,
        recipe=recipes.origins(config.recipe, to_dict(config)) if config.recipe else None,
        model=config.model,
        model_folder=str(folder.resolve()),
        weights=weights_fingerprint(folder),
        template=prompt_format.template,
        family=prompt_format.family,
        chat_format=prompt_format.chat_format.name,
        data=DataRecord.of(counts),
        mix=tuple(DataRecord.of(c) for c in mixed_counts),
        validation=validation_counts and DataRecord.of(validation_counts),
        dtype=str(dtype).removeprefix("torch."),
        full=config.full,
        micro_batch_tokens=micro_batch_tokens,
        environment={**records.environment(), "ranks": world.size},
    )
    world.barrier()  # all have seen whether there is a run to resume before the main process begins one
    place = config.resume or config.out
    if old and old.status == "running" and place:
        check_same(place, old, record)
        say(f"{place} holds an unfinished run of these settings: it is resumed")
        for difference in rounding(old, record):
            say(f"note: {difference}, so the last digits may come out differently than without the interruption")
    with claim(place, record) if world.first else nullcontext() as run:
        out = run.folder if run else place or Path()
        decoder = load_decoder(folder, dtype, device)
        decoder.activation_checkpointing = activation_checkpointing
        if lora is None:
            weights = dict(decoder.requires_grad_(True).named_parameters())
        else:
            weights = add_lora(decoder, lora, config.seed)
        trained = sum(p.numel() for p in weights.values())
        say(f"training {trained:,} parameters in {record.dtype}, run folder {out}")

        asked = (validation_source or mixture.source).conversations[:SAMPLES]
        samples = Samples(asked, prompt_format, prompt_format.stop_ids)

        def on_step(step: int) -> None:
            if step in looks:
                (out / looks[step]).mkdir(exist_ok=True)
                _save(decoder, folder, out / looks[step], lora)
                so_far = replace(record, status="finished", finished_at=time.time(), steps=step)
                so_far.write(out / looks[step])

        with memory.explain_oom(planned):
            done = fit(
                decoder,
                weights,
                mixture,
                loop,
                out,
                world,
                Keeping(config.eval_every, config.save_every, config.keep, config.tensorboard),
                validation,
                samples if config.eval_every else None,
                watch(mixture.source, config.allow),
                on_step,
            )
        if run is None:
            return None
        if done["before"] is not None:
            say(f"validation loss per trained token: {done['before']:.4f} before, {done['after']:.4f} after")
        loss = LossRecord(before=done["before"], after=done["after"], examples=len(validation))
        if config.eval_every:
            loss = replace(loss, best=done["best"], best_step=done["best_step"])
        told = {k: v for k, v in dataclasses.asdict(loss).items() if config.eval_every or not k.startswith("best")}
        result = {"run": str(out), "steps": done["steps"], "validation_loss": told, **counts, "mix": mixed_counts}
        _save(decoder, folder, out, lora)
        best = out / "state" / f"step-{done['best_step'] or 0:08d}"
        if config.eval_every and done["best_step"] not in (None, done["steps"]) and best.exists():
            checkpoint.load_state(best, weights)
            (out / "best").mkdir(exist_ok=True)
            _save(decoder, folder, out / "best", lora)
            at_best = replace(record, status="finished", finished_at=time.time(), steps=done["best_step"])
            replace(at_best, validation_loss=loss).write(out / "best")
            say(f"the best validation loss was {done['best']:.4f} after step {done['best_step']}: {out / 'best'}")
        run.finish(result, steps=done["steps"], validation_loss=loss, time={"seconds": time.monotonic() - began})
    seconds = time.monotonic() - began
    other = " --data TEST-FILE" if not sources.has_test_part(config.data, config.holdout) else ""
    say(f"finished in {seconds:.0f} s; next: python -m ptst.eval --template chat:llama{other}")
    return result


def _validation(config: TrainConfig, prompt_format: PromptFormat, max_length: int) -> tuple:
    """(source, examples, counts) for the validation loss; (None, [], None) where there are no such data."""
    holdout = 0.0 if config.val_data else config.holdout
    name = config.val_data or (config.data if holdout else None)
    if name is None and config.data.startswith(sources.DEFAULT):
        name = sources.DEFAULT
    if name is None:
        return None, [], None
    source = sources.load(name, "validation", holdout=holdout)
    examples, counts = prepare(source, prompt_format, max_length, config.too_long, config.train_on)
    check_not_empty(examples, name)
    return source, examples, {"name": name, **counts.to_json()}


def looks_by_step(config: TrainConfig, planned: Sequence[Step]) -> dict[int, str]:
    """By step, the folder in the run that holds what is trained by then. Raises UserError for epochs that are not
    reached, and for two of the same step."""
    looks: dict[int, str] = {}
    for epochs in config.at_epochs:
        # A step's `epoch` is where it begins, so the one before it has reached that far.
        reached = next((i for i, s in enumerate(planned) if i and s.epoch >= epochs - 1e-9), len(planned))
        ends_before = reached == len(planned) and (config.max_steps == reached or epochs > config.epochs)
        if epochs <= 0 or ends_before:
            raise UserError(f"--at-epochs {epochs:g} must be above 0 and within the run's {len(planned)} steps")
        if reached in looks:
            raise UserError(
                f"--at-epochs: {looks[reached]} and epoch-{epochs:g} are the same step, {reached} of {len(planned)}; "
                "leave one out"
            )
        looks[reached] = f"epoch-{epochs:g}"
    return looks


def _save(decoder: Decoder, base: Path, out: Path, lora: LoraConfig | None) -> None:
    """Write what was trained."""
    if lora is None:
        save_full(decoder, base, out)
    else:
        save_adapter(decoder, out, lora, str(base.resolve()))
    sync(out)


def start(arguments: list[str]) -> tuple[TrainConfig, str] | None:
    """The settings to start from: a recipe's, or those of the run to resume."""
    if folder := cli.value_of(arguments, "--resume"):
        record = read_record(Path(folder), TrainRecord)
        known = {f.name for f in dataclasses.fields(TrainConfig)}
        kept = {k: v for k, v in record.settings.items() if k in known and v is not None and k not in ("out", "resume")}
        return replace(merge(TrainConfig(), kept, f"{folder}/run.json"), resume=Path(folder)), ""
    name = cli.value_of(arguments, "--recipe")
    if name in recipes.RECIPES:
        return TrainConfig(recipe=name), f"{TrainConfig.__doc__}\n\n{recipes.describe(name)}"
    return None


def main() -> None:
    cli.run(run_training, TrainConfig, "train", start)


if __name__ == "__main__":
    main()
