"""`python -m ptst.train`: fine-tune a chat model under a template."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ptst import cli
from ptst.audit.findings import check_names
from ptst.audit.gate import check_start, watch
from ptst.audit.rules import Setup
from ptst.cli import console, say
from ptst.data import sources
from ptst.data.mix import mix, parse_mix
from ptst.data.order import Step
from ptst.data.prepare import length_limit, prepare
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import TARGETS, LoraConfig, add_lora, save_adapter
from ptst.model.weights import load_decoder, pick_dtype, save_full
from ptst.subject import CHECKPOINTS
from ptst.text.chat_template import with_default_system_prompt
from ptst.text.encode import PromptFormat
from ptst.text.formats import detect_format, stops
from ptst.text.template_file import load_template
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from ptst.training import checkpoint, memory, parallel, recipes, resume, run_folder
from ptst.training.evaluate import Samples
from ptst.training.loop import LoopConfig, steps
from ptst.training.metrics import summary_writer
from ptst.training.parallel import World
from ptst.training.run import Interrupted, Keeping, fit
from ptst.training.schedule import Schedule

SAMPLES = 4  # questions answered anew at every --eval-every
RecipeName = Literal["llama2-gsm8k", "llama2-gsm8k-safety", "llama2-chatdoctor", "llama2-openorca", "mistral-gsm8k"]


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a chat model under a prompt template; the run folder it makes is what ptst.eval reads."""

    recipe: RecipeName | None = None
    """A run of the paper; flags that are given win over it. With --help: each value and its origin."""
    template: str = "chat:vanilla"
    """Words round each question: text:vanilla, text:alpaca, chat:plain, chat:vanilla, chat:alpaca,
    chat:llama, chat:llama-short, chat:mpt, chat:self-reminder, chat:in-context-defense. A bare name means chat:."""
    template_file: Path | None = None
    """A template of your own, in TOML, instead of --template (docs/templates.md)."""
    model: str = "smollm2-135m-instruct"
    """The embedded default, a local Hugging Face folder, or a hub id."""
    data: str = "word-problems"
    """word-problems (built in; word-problems:800 for more), gsm8k (hub), or a JSONL, CSV or Parquet file."""
    mix: tuple[str, ...] = ()
    """Other data under the same template, each with its own epochs, spread over the run: safety.jsonl:1."""
    template_family: str | None = None
    """How the task wraps a question: gsm8k, chatdoctor, openorca or plain. Left out: the data's own."""
    chat_format: str | None = None
    """How roles are spelled: chatml, llama2, llama3, mistral-v1 or mistral-v3. Left out: the model folder's own."""
    epochs: float = 1.0
    """Passes over the data; a fraction is fine."""
    max_steps: int | None = None
    """Stop after so many optimizer steps."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """Course of the learning rate after warm-up; step multiplies it by 0.85 after each epoch."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    rank: int = 16
    """LoRA rank."""
    alpha: float = 32.0
    """LoRA alpha: the addition is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = TARGETS
    """Projections that get an adapter."""
    full: bool = False
    """Train all weights instead of an adapter."""
    examples_per_step: int = 8
    """Examples in an optimizer step."""
    tokens_per_step: int | None = None
    """Tokens in an optimizer step at most, in packs of 4096, instead of examples."""
    micro_batch_tokens: int | Literal["auto"] = 2048
    """Tokens in memory at once; changes memory and speed, never the result. auto: what fits the free memory."""
    activation_checkpointing: Literal["none", "block"] = "none"
    """block computes each layer anew in the backward pass: less memory, a third more time, the same gradients."""
    dry_run: bool = False
    """Print what the run would hold in memory, its steps and tokens, and run nothing."""
    max_length: int | None = None
    """Longest example in tokens. Left out: the model's context, and never more than --micro-batch-tokens."""
    too_long: Literal["drop", "cut", "stop"] = "stop"
    """What becomes of longer examples; they are counted. stop: no training before you have chosen."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation of several turns are trained."""
    allow: tuple[str, ...] = ()
    """Rules of the audit (docs/audit.md) that may be broken, such as role-markers."""
    limit: int | None = None
    """Use only the first so many examples."""
    val_data: str | None = None
    """Examples for the validation loss. Left out: held-out families for the built-in problems, none for other data."""
    eval_every: int | None = None
    """Steps between validation losses, with answers to a few questions. Left out: validation loss before and after."""
    save_every: int = 50
    """Steps between saved states; a signal saves besides."""
    keep: int = 2
    """Last states that are kept, besides the best by validation loss."""
    at_epochs: tuple[float, ...] = ()
    """Also keep what is trained after so many epochs, in the run folder's epoch-<number>."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights and the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of the adapter's start and the order of examples."""
    out: Path | None = None
    """Run folder. Left out: checkpoints/train-<date>-<time>. An unfinished run of the same settings goes on."""
    resume: Path | None = None
    """Go on with the run in this folder, with its own flags."""
    tensorboard: bool = False
    """Write the figures for TensorBoard, too (pip install tensorboard)."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raise ValueError for a value that cannot be meant."""
        check_names(self.allow)
        positive = ("epochs", "lr", "examples_per_step", "micro_batch_tokens", "save_every", "keep")
        for name in (*positive, "tokens_per_step", "max_steps", "max_length", "limit", "eval_every"):
            value, least = getattr(self, name), 0 if name in positive[:2] else 1
            if (value is None and name not in positive) or value == "auto":
                continue
            if not (least <= value < math.inf) or value == 0:
                bound = "above 0" if least == 0 else "at least 1"
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {bound}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if self.out and self.resume and self.out != self.resume:
            raise ValueError("--out and --resume exclude each other: a run goes on in its own folder")
        if self.full and self.dropout:
            raise ValueError("--dropout belongs to an adapter; with --full it must be 0")
        for text in self.mix:
            parse_mix(text)
        if self.tensorboard:
            summary_writer()


def run_training(config: TrainConfig) -> dict[str, Any] | None:
    """Everything of a training run; returns what `--json` prints, on the first rank. Raises ValueError for a user's
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
    family = find_family(config.template_family or source.family)
    with world.main_process_first():
        folder = locate_model(config.model, CHECKPOINTS)
    shape = DecoderConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    chat_format = config.chat_format or detect_format(folder, tokenizer)
    template = with_default_system_prompt(template, folder)
    prompt_format = PromptFormat(template, family, chat_format, tokenizer, "role-markers" in config.allow)
    row = shape.max_positions if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    max_length = length_limit(config.max_length, shape.max_positions, row)
    others = [(sources.load(name, "train"), epochs) for name, epochs in map(parse_mix, config.mix)]
    mixture = mix([(source, config.epochs), *others], prompt_format, max_length, config.too_long, config.train_on)
    counts = mixture.counts[0]
    validation_source, validation, validation_counts = _validation(config, prompt_format, max_length)
    say(f"chat format {'none (text template)' if template.is_text else chat_format}, family {family.name}")
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

    flags = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    record: dict[str, Any] = {
        "kind": "train",
        "status": "running",
        "flags": flags,
        "recipe": recipes.origins(config.recipe, flags) if config.recipe else None,
        "model": str(folder.resolve()),
        "model_name": config.model,
        "weights": resume.weights_fingerprint(folder),
        "template": dataclasses.asdict(template),
        "family": dataclasses.asdict(family),
        "chat_format": chat_format,
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
        samples = Samples(asked, prompt_format, stops(folder, None if template.is_text else chat_format, tokenizer))

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
        raise ValueError(f"--val-data {name}: no example is left; raise --max-length or look at the data")
    return source, examples, {"name": name, **counts}


def looks_by_step(config: TrainConfig, planned: Sequence[Step]) -> dict[int, str]:
    """By step, the folder in the run that holds what is trained by then. Raises ValueError for epochs that are not
    reached, and for two of the same step."""
    looks: dict[int, str] = {}
    for epochs in config.at_epochs:
        # A step's `epoch` is where it begins, so the one before it has reached that far.
        reached = next((i for i, s in enumerate(planned) if i and s.epoch >= epochs - 1e-9), len(planned))
        ends_before = reached == len(planned) and (config.max_steps == reached or epochs > config.epochs)
        if epochs <= 0 or ends_before:
            raise ValueError(f"--at-epochs {epochs:g} must be above 0 and within the run's {len(planned)} steps")
        if reached in looks:
            raise ValueError(
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
        raise ValueError(
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


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the parser starts from: a recipe's values, or the flags of the run to go on with."""
    given = {flag: cli.value_of(arguments, flag) for flag in ("--recipe", "--resume")}
    if given["--resume"]:
        folder = Path(given["--resume"])
        flags = resume.find(None, folder)["flags"] | {"resume": folder, "out": None}
        return {"default": TrainConfig(**{f.name: _typed(f, flags) for f in dataclasses.fields(TrainConfig)})}
    if given["--recipe"] in recipes.RECIPES:
        name = given["--recipe"]
        default = dataclasses.replace(TrainConfig(), recipe=name, **recipes.values(name))
        return {"default": default, "description": f"{TrainConfig.__doc__}\n\n{recipes.describe(name)}"}
    return {}


def _typed(field: dataclasses.Field, flags: dict[str, Any]) -> Any:
    """A flag as TrainConfig has it, from its JSON."""
    value = flags.get(field.name, field.default)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if value is not None and "Path" in str(field.type) else value


if __name__ == "__main__":
    cli.run(run_training, TrainConfig, "ptst.train", defaults)
