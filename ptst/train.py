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

from ptst import cli
from ptst.audit.gate import check_start, watch
from ptst.audit.rules import Setup
from ptst.config_file import merge
from ptst.data import sources
from ptst.data.mix import mix, parse_mix
from ptst.data.order import Step
from ptst.data.prepare import length_limit, prepare
from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, save_adapter
from ptst.model.lora_config import LoraConfig
from ptst.model.weights import load_decoder, pick_dtype, save_full
from ptst.open import CHECKPOINTS, open_model
from ptst.progress import console, say
from ptst.settings import to_dict
from ptst.text.prompt_format import PromptFormat
from ptst.text.template_file import load_template
from ptst.text.templates import find_template
from ptst.training import checkpoint, memory, parallel, recipes, resume, run_folder
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
    old = resume.find(config.out, config.resume)
    if old and old["status"] == "finished":
        say(f"{config.resume} has finished already; there is nothing to go on with")
        return old.get("result") if world.first else None
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    lora = None
    if not config.full:
        lora = LoraConfig(config.rank, config.alpha, config.target_modules, dropout=config.dropout)
    say(f"ptst.train: {config.model}, template {template.name}, data {config.data}")

    source = sources.load(config.data, "train", config.limit)
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
    counts = mixture.counts[0]
    validation_source, validation, validation_counts = _validation(config, prompt_format, max_length)
    say(prompt_format.described)
    for c in mixture.counts:
        say(
            f"{c['name']}, {c['epochs']:g} epochs: {c['examples']} examples, {c['tokens']} tokens, "
            f"{c['trained_tokens']} of them trained; {c['dropped']} dropped, {c['cut']} cut, "
            f"{c['token_boundaries']} token boundaries"
        )
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", pick_dtype(config.dtype)
    lengths, activation_checkpointing = (
        [len(e.ids) for e in mixture.examples],
        config.activation_checkpointing == "block",
    )
    micro_batch_tokens = config.micro_batch_tokens
    if micro_batch_tokens == "auto" and old:
        micro_batch_tokens = old["micro_batch_tokens"]  # another number might round the last digits otherwise
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
    all_steps = steps(lengths, loop, mixture.parts)
    looks = looks_by_step(config, all_steps)
    if config.dry_run:
        tokens = sum(lengths[i] for step in all_steps for i in step.examples)
        planned = dataclasses.replace(planned, steps=len(all_steps), tokens=tokens)
        console.print(planned.table())
        return planned.described() if world.first else None
    setup = Setup(prompt_format, config.train_on, max_length, config.too_long)
    for warning in check_start(mixture.source, mixture.examples, setup, micro_batch_tokens, config.allow):
        say(warning)

    flags = to_dict(config)
    record: dict[str, Any] = {
        "kind": "train",
        "status": "running",
        "flags": flags,
        "recipe": recipes.origins(config.recipe, flags) if config.recipe else None,
        "model": str(folder.resolve()),
        "model_name": config.model,
        "weights": resume.weights_fingerprint(folder),
        "template": dataclasses.asdict(prompt_format.template),
        "family": dataclasses.asdict(prompt_format.family),
        "chat_format": prompt_format.chat_format,
        "data": counts,
        "mix": mixture.counts[1:],
        "validation": validation_counts,
        "dtype": str(dtype).removeprefix("torch."),
        "full": config.full,
        "micro_batch_tokens": micro_batch_tokens,
        "environment": {**run_folder.environment(), "ranks": world.size},
    }
    out = _claim(config, old, record, world)
    with resume.exclusive_lock(out) if world.first else nullcontext():
        if world.first:
            run_folder.remove_partial_files(out)
            run_folder.write_json(out / "run.json", record)
        decoder = load_decoder(folder, dtype, device)
        decoder.activation_checkpointing = activation_checkpointing
        if lora is None:
            weights = dict(decoder.requires_grad_(True).named_parameters())
        else:
            weights = add_lora(decoder, lora, config.seed)
        trained = sum(p.numel() for p in weights.values())
        say(f"training {trained:,} parameters in {record['dtype']}, run folder {out}")

        asked = (validation_source or mixture.source).conversations[:SAMPLES]
        samples = Samples(asked, prompt_format, prompt_format.stop_ids)

        def on_step(step: int) -> None:
            if step in looks:
                (out / looks[step]).mkdir(exist_ok=True)
                so_far = {"status": "finished", "finished_at": time.time(), "steps": step}
                _save(decoder, folder, out / looks[step], lora)
                run_folder.write_json(out / looks[step] / "run.json", record | so_far)

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
        if not world.first:
            return None
        if done["before"] is not None:
            say(f"validation loss per trained token: {done['before']:.4f} before, {done['after']:.4f} after")
        loss = {"before": done["before"], "after": done["after"], "examples": len(validation)}
        loss |= {"best": done["best"], "best_step": done["best_step"]} if config.eval_every else {}
        result = {"run": str(out), "steps": done["steps"], "validation_loss": loss, **counts, "mix": record["mix"]}
        record |= {
            "status": "finished",
            "finished_at": time.time(),
            "steps": done["steps"],
            "validation_loss": loss,
            "result": result,
            "time": {"seconds": time.monotonic() - began},
        }
        _save(decoder, folder, out, lora)
        best = out / "state" / f"step-{done['best_step'] or 0:08d}"
        if config.eval_every and done["best_step"] not in (None, done["steps"]) and best.exists():
            checkpoint.load_state(best, weights)
            (out / "best").mkdir(exist_ok=True)
            _save(decoder, folder, out / "best", lora)
            run_folder.write_json(out / "best" / "run.json", record | {"steps": done["best_step"]})
            say(f"the best validation loss was {done['best']:.4f} after step {done['best_step']}: {out / 'best'}")
        run_folder.write_json(out / "run.json", record)  # the last of all: it says that the run is whole
        run_folder.sync(out)
    other = " --data TEST-FILE" if sources.is_file(config.data) else ""
    say(f"finished in {record['time']['seconds']:.0f} s; next: python -m ptst.eval --template chat:llama{other}")
    return result


def _validation(config: TrainConfig, prompt_format: PromptFormat, max_length: int) -> tuple:
    """(source, examples, counts) for the validation loss; (None, [], None) where there are no such data."""
    name = config.val_data or (sources.DEFAULT if config.data.startswith(sources.DEFAULT) else None)
    if name is None:
        return None, [], None
    source = sources.load(name, "validation")
    examples, counts = prepare(source, prompt_format, max_length, config.too_long, config.train_on)
    if not examples:
        raise UserError(f"--val-data {name}: no example is left; raise --max-length or look at the data")
    return source, examples, {"name": name, **counts}


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


def _claim(config: TrainConfig, old: dict[str, Any] | None, record: dict[str, Any], world: World) -> Path:
    """The run folder: a new one, or that of an unfinished run of the same settings."""
    out = config.resume or config.out
    if old is None:
        world.barrier()  # the others have looked whether a run was there before the first begins one
        return run_folder.create(out, CHECKPOINTS, "train") if world.first else Path()
    assert out is not None
    if differ := resume.differences(old, record):
        raise UserError(
            f"{out} holds an unfinished run of other settings: {'; '.join(differ)}; give those, or another --out"
        )
    say(f"{out} holds an unfinished run of these settings: it goes on")
    for difference in resume.rounding(old, record):
        say(f"note: {difference}, so the last digits may come out differently than without the interruption")
    return out


def _save(decoder: Decoder, base: Path, out: Path, lora: LoraConfig | None) -> None:
    """Write what was trained."""
    if lora is None:
        save_full(decoder, base, out)
    else:
        save_adapter(decoder, out, lora, str(base.resolve()))
    run_folder.sync(out)


def start(arguments: list[str]) -> tuple[TrainConfig, str] | None:
    """The settings to start from: a recipe's, or those of the run to resume."""
    if folder := cli.value_of(arguments, "--resume"):
        record = resume.find(None, Path(folder))
        assert record is not None
        known = {f.name for f in dataclasses.fields(TrainConfig)}
        kept = {k: v for k, v in record["flags"].items() if k in known and v is not None and k not in ("out", "resume")}
        return replace(merge(TrainConfig(), kept, f"{folder}/run.json"), resume=Path(folder)), ""
    name = cli.value_of(arguments, "--recipe")
    if name in recipes.RECIPES:
        return TrainConfig(recipe=name), f"{TrainConfig.__doc__}\n\n{recipes.describe(name)}"
    return None


def main() -> None:
    cli.run(run_training, TrainConfig, "train", start)


if __name__ == "__main__":
    main()
