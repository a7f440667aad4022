"""`python -m ptst.train`: fine-tune a chat model under a template."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ptst import command
from ptst.audit.findings import check_names
from ptst.audit.gate import check_start, watch
from ptst.audit.rules import Setup
from ptst.command import ProgressLine, say
from ptst.data import sources
from ptst.data.packing import Batch
from ptst.data.prepare import prepare
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.likelihood import mean_loss
from ptst.model.locate import locate_model
from ptst.model.lora import TARGETS, LoraConfig, add_lora, save_adapter
from ptst.model.weights import hf_name, load_decoder, pick_dtype, save_safetensors
from ptst.text.encode import Encoded, Prompting
from ptst.text.formats import detect_format
from ptst.text.own_template import with_default_system
from ptst.text.template_file import load_template
from ptst.text.templates import find_family, find_template
from ptst.text.tokenizer import load_tokenizer
from ptst.training import memory, run_folder
from ptst.training.loop import LoopConfig, StepReport, plan, train
from ptst.training.schedule import Schedule

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a chat model under a prompt template; the run folder it makes is what ptst.eval reads."""

    template: str = "chat:vanilla"
    """Words round each question: text:vanilla, text:alpaca, chat:plain, chat:vanilla, chat:alpaca,
    chat:llama, chat:llama-short, chat:mpt, chat:self-reminder, chat:in-context-defense. A bare name means chat:."""
    template_file: Path | None = None
    """A template of your own, in TOML, instead of --template (docs/templates.md)."""
    model: str = "smollm2-135m-instruct"
    """The embedded default, a local Hugging Face folder, or a hub id."""
    data: str = "word-problems"
    """word-problems (built in; word-problems:800 for more), gsm8k (hub), or a JSONL, CSV or Parquet file."""
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
    target_modules: tuple[str, ...] = TARGETS
    """Projections that get an adapter."""
    full: bool = False
    """Train all weights instead of an adapter."""
    examples_per_step: int = 8
    """Examples in an optimizer step."""
    tokens_per_step: int | None = None
    """Tokens in an optimizer step, instead of examples."""
    micro_tokens: int | Literal["auto"] = 2048
    """Tokens in memory at once; changes memory and speed, never the result. auto: what fits the free memory."""
    recompute: Literal["none", "block"] = "none"
    """block computes each layer anew in the backward pass: less memory, a third more time, the same gradients."""
    dry_run: bool = False
    """Print what the run would hold in memory, its steps and tokens, and run nothing."""
    max_length: int | None = None
    """Longest example in tokens. Left out: the model's context."""
    too_long: Literal["drop", "cut"] = "drop"
    """What becomes of longer examples; they are counted either way."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation of several turns are trained."""
    allow: tuple[str, ...] = ()
    """Rules of the audit (docs/audit.md) that may be broken, such as role-marks."""
    limit: int | None = None
    """Use only the first so many examples."""
    val_data: str | None = None
    """Examples for the held-out loss. Left out: held-out families for the built-in problems, none for other data."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights and the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of the adapter's start and the order of examples."""
    out: Path | None = None
    """Run folder. Left out: checkpoints/train-<date>-<time>."""
    json: bool = False
    """Print the result as one JSON object."""

    def check(self) -> None:
        """Raise ValueError for a value that cannot be meant."""
        check_names(self.allow)
        for name in ("epochs", "lr", "examples_per_step", "micro_tokens"):
            if getattr(self, name) != "auto" and getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        for name in ("max_steps", "tokens_per_step", "max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def run_training(config: TrainConfig) -> dict[str, Any]:
    """Everything of a training run; returns what `--json` prints. Raises ValueError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    lora = None if config.full else LoraConfig(config.rank, config.alpha, config.target_modules)
    say(f"ptst.train: {config.model}, template {template.name}, data {config.data}")

    source = sources.load(config.data, "train", config.limit)
    family = find_family(config.template_family or source.family)
    folder = locate_model(config.model, CHECKPOINTS)
    shape = DecoderConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    chat_format = config.chat_format or detect_format(folder, tokenizer)
    template = with_default_system(template, folder)
    prompting = Prompting(template, family, chat_format, tokenizer, "role-marks" in config.allow)
    max_length = min(config.max_length or shape.max_positions, shape.max_positions)
    examples, counts = prepare(source, prompting, max_length, config.too_long, config.train_on)
    held_out = _held_out(config, prompting, max_length)
    say(
        f"chat format {'none (text template)' if template.is_text else chat_format}, family {family.name}; "
        f"{counts['examples']} examples, {counts['tokens']} tokens, {counts['trained_tokens']} of them trained; "
        f"{counts['dropped']} dropped, {counts['cut']} cut, {counts['seams']} seams"
    )
    if not examples:
        raise ValueError(f"{config.data}: no example is left to train on; raise --max-length or look at the data")
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), pick_dtype(config.dtype)
    recompute = config.recompute == "block"
    if config.micro_tokens == "auto":
        longest = max(len(e.ids) for e in examples)
        chosen = memory.choose_micro_tokens(shape, lora, dtype, device, recompute, longest)
        config = dataclasses.replace(config, micro_tokens=chosen)
        say(f"--micro-tokens auto: {chosen} fit")
    batches = list(plan([len(e.ids) for e in examples], _loop_config(config)))
    tokens = sum(len(examples[i].ids) for _, group in batches for i in group)
    planned = memory.plan_memory(shape, lora, dtype, config.micro_tokens, device, recompute, len(batches), tokens)
    if config.dry_run:
        command.console.print(planned.table())
        return planned.described()
    setup = Setup(prompting, config.train_on, max_length, config.too_long)
    for warning in check_start(source, examples, setup, config.micro_tokens, config.allow):
        say(warning)

    out = run_folder.create(config.out, CHECKPOINTS, "train")
    record: dict[str, Any] = {
        "kind": "train",
        "status": "running",
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "model": str(folder.resolve()),
        "model_name": config.model,
        "template": dataclasses.asdict(template),
        "family": dataclasses.asdict(family),
        "chat_format": chat_format,
        "data": {"name": source.name, "fingerprint": source.fingerprint, **counts},
        "dtype": str(dtype).removeprefix("torch."),
        "full": config.full,
        "environment": run_folder.environment(),
    }
    run_folder.write_json(out / "run.json", record)

    decoder = load_decoder(folder, dtype, device)
    decoder.recompute = recompute
    if lora is None:
        parameters = list(decoder.requires_grad_(True).parameters())
    else:
        parameters = list(add_lora(decoder, lora, config.seed).values())
    trained = sum(p.numel() for p in parameters)
    say(f"training {trained:,} parameters in {record['dtype']}, run folder {out}")

    before = mean_loss(decoder, held_out, config.micro_tokens) if held_out else None
    with memory.out_of_memory_told(planned):
        steps = _loop(decoder, parameters, examples, config, out, watch(source, config.allow))
    after = mean_loss(decoder, held_out, config.micro_tokens) if held_out else None
    if before is not None:
        say(f"held-out loss per trained token: {before:.4f} before, {after:.4f} after")

    if lora is None:
        save_full(decoder, folder, out)
    else:
        save_adapter(decoder, out, lora, str(folder.resolve()))
    record |= {
        "status": "finished",
        "finished_at": time.time(),
        "steps": steps,
        "held_out_loss": {"before": before, "after": after, "examples": len(held_out)},
        "time": {"seconds": time.monotonic() - began},
    }
    run_folder.write_json(out / "run.json", record)
    say(f"finished in {record['time']['seconds']:.0f} s; next: python -m ptst.eval --template chat:llama")
    return {"run": str(out), "steps": steps, "held_out_loss": record["held_out_loss"], **counts}


def _held_out(config: TrainConfig, prompting: Prompting, max_length: int) -> list[Encoded]:
    name = config.val_data
    if name is None:
        if not config.data.startswith(sources.DEFAULT):
            return []
        name = sources.DEFAULT
    return prepare(sources.load(name, "validation"), prompting, max_length, "drop", config.train_on)[0]


def _loop_config(config: TrainConfig) -> LoopConfig:
    names = {f.name for f in dataclasses.fields(LoopConfig)}
    return LoopConfig(**{k: v for k, v in dataclasses.asdict(config).items() if k in names})


def _loop(
    decoder: Decoder,
    parameters: list,
    examples: list[Encoded],
    config: TrainConfig,
    out: Path,
    check: Callable[[Batch], None],
) -> int:
    loop = _loop_config(config)
    smooth = None
    with ProgressLine("train", 1) as progress:

        def on_step(report: StepReport) -> None:
            nonlocal smooth
            smooth = report.loss if smooth is None else 0.9 * smooth + 0.1 * report.loss
            progress.total = report.total
            progress.bar.update(progress.task, total=report.total)
            progress.update(report.step, f"loss {smooth:.3f}  {report.tokens / report.seconds:.0f} tokens/s")
            row = dataclasses.asdict(report)
            seconds = row.pop("seconds")
            row["time"] = {"seconds": seconds, "tokens_per_second": report.tokens / seconds}
            run_folder.append_jsonl(out / "metrics.jsonl", row)

        return train(decoder, parameters, examples, loop, on_step, check)


def save_full(decoder: Decoder, base: Path, out: Path) -> None:
    """Write all weights as a Hugging Face folder, with the base's config and tokenizer files."""
    for path in base.glob("*.json"):
        if not path.name.endswith(".index.json") and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    if (base / "tokenizer.model").exists():
        shutil.copyfile(base / "tokenizer.model", out / "tokenizer.model")
    save_safetensors(out / "model.safetensors", {hf_name(k): v for k, v in decoder.state_dict().items()})


if __name__ == "__main__":
    command.run(run_training, TrainConfig, "ptst.train")
