"""What is known of a training run before its weights are loaded: model, examples, optimizer steps, memory."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptst import records
from ptst.audit.account.gate import Prepared, check_start, refuse
from ptst.audit.account.run_rows import check_run_rows
from ptst.audit.account.verdicts import verdict_key
from ptst.audit.setup import Setup
from ptst.data.example_arrays import lengths_of
from ptst.data.examples import Mixture, check_not_empty, length_limit, mix, prepare
from ptst.data.order import Step, uneven_turns
from ptst.data.packing import largest_micro_batch
from ptst.data.selection import selection_notes
from ptst.data.sources import Source
from ptst.data.steps import taken_by
from ptst.errors import Setting, UserError
from ptst.fingerprints import tokenizer_fingerprint, weights_fingerprint
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.open import OpenModel, open_model
from ptst.progress import say
from ptst.records import DataRecord, TrainRecord, absolute
from ptst.text.encode import Example
from ptst.text.prompt_format import check_used, with_roles
from ptst.text.templates import find_template, load_template
from ptst.training import memory, recipes
from ptst.training.config import TrainConfig
from ptst.training.memory import MemoryPlan, Method
from ptst.training.parallel import ALONE, World
from ptst.training.reference import check_reference, find_reference
from ptst.training.run_sources import mix_templates, read_family, read_first, read_main, read_others, reads_all
from ptst.training.shard_choice import check_ranks, choose_sharding
from ptst.training.trainer import TrainerConfig


@dataclass(frozen=True)
class Validation:
    """The validation set. `source` None: there is none, and the sample answers are to training questions."""

    source: Source | None = None
    examples: Sequence[Example] = ()
    record: DataRecord | None = None


@dataclass(frozen=True)
class RunPlan:
    """`epoch_folders`: by step, the folder in the run that gets the weights of then. `lora` None: full fine-tuning.
    `reference`: the folder of a token constraint's model, where that is another one than what is trained. `sharded`:
    weights are spread over the ranks."""

    config: TrainConfig
    model: OpenModel
    lora: LoraConfig | None
    mixture: Mixture
    validation: Validation
    max_length: int
    dtype: torch.dtype
    device: str
    trainer: TrainerConfig
    memory: MemoryPlan
    epoch_folders: dict[int, str]
    reference: Path | None = None
    sharded: bool = False

    def check(self) -> None:
        """Run the audit's rules on all examples and say its warnings. Raises UserError for an error not allowed."""
        c = self.config
        setup = Setup(self.model.prompt_format, c.train_on, self.max_length, c.too_long, c.template_file)
        data = [Prepared(self.mixture.source, self.mixture.examples, self.mixture.records, self.mixture.sources)]
        if self.validation.source and self.validation.record:
            data.append(Prepared(self.validation.source, self.validation.examples, [self.validation.record]))
        size = self.trainer.micro_batch_tokens
        key = verdict_key(((p.source, p.examples) for p in data), *self._audited(), size)
        for warning in check_start(data, setup, size, c.allow, key, say):
            say(warning)

    def _audited(self) -> tuple[Any, ...]:
        """What an audit's verdict depends on besides the data."""
        c, p = self.config, self.model.prompt_format
        asked = c.train_on, self.max_length, c.too_long, sorted(p.stop_ids), p.allow_role_markers
        files = [c.template_file, *(source.template_file for source in self.mixture.sources)]
        words = [None if file is None else file.read_text("utf-8", "surrogateescape") for file in files]
        held_out = [self.validation.record] if self.validation.record else []
        counts = [dataclasses.astuple(dataclasses.replace(r, epochs=0)) for r in (*self.mixture.records, *held_out)]
        parts = [repr(part) for part in (p.template, p.family, p.chat_format)]
        return asked, words, counts, parts, tokenizer_fingerprint(self.model.folder)

    def record(self, world: World) -> TrainRecord:
        """The record of the run at its beginning."""
        c, prompt_format = self.config, self.model.prompt_format
        data, *mixed = (dataclasses.replace(r, name=absolute(r.name)) for r in self.mixture.records)
        return TrainRecord(
            config=c,
            recipe=recipes.origins(c.recipe, vars(c)) if c.recipe else None,
            model=c.model,
            model_folder=str(self.model.folder.resolve()),
            weights=weights_fingerprint(self.model.folder),
            tokenizer=tokenizer_fingerprint(self.model.folder),
            template=prompt_format.template,
            family=prompt_format.family,
            chat_format=prompt_format.chat_format.name,
            data=dataclasses.replace(data, holdout=c.holdout),
            mix=tuple(mixed),
            validation=self.validation.record,
            dtype=str(self.dtype).removeprefix("torch."),
            full=c.full,
            reference=weights_fingerprint(self.reference) if self.reference else None,
            micro_batch_tokens=self.trainer.micro_batch_tokens,
            environment={**records.environment(), "ranks": world.size} | ({"sharded": True} if self.sharded else {}),
        )


def plan_run(config: TrainConfig, world: World = ALONE, micro_batch_tokens: int | None = None) -> RunPlan:
    """Read and encode the data, choose what is left to choose. `micro_batch_tokens`: the number that an earlier process
    of this run chose where the setting is auto (another one might change the last digits).

    Raises UserError for a mistake in the settings, the model folder or the data.
    """
    template = load_template(config.template_file) if config.template_file else find_template(config.template)
    with world.main_process_first():
        reference = find_reference(config.reference) if config.reference is not None else None
    say(f"reading {config.data}")
    source = None if reads_all(config) is None else read_main(config)
    templates = [template, *mix_templates(config.mix)]
    check_used(config.chat_format, *templates)
    with world.main_process_first():
        model = open_model(
            config.model,
            with_roles(*templates),
            family=config.template_family or (source.family if source else read_family(config)),
            chat_format=config.chat_format,
            allow=config.allow,
        ).with_template(template)
    shape, method = model.config, Method.of(config)
    max_length = length_limit(config.max_length, shape.max_positions, config.micro_batch_tokens)
    if source is None:
        source, prompt_format = read_first(config, model.prompt_format, max_length)
        model = dataclasses.replace(model, prompt_format=prompt_format)
    mixture, validation = _read(config, source, model, max_length)
    lengths = lengths_of(mixture.examples)
    if sharded := choose_sharding(config, shape, method, max(lengths, default=1), world):
        method = dataclasses.replace(method, ranks=world.size)
    if reference is not None:
        check_reference(reference, model.folder, max(lengths, default=0))
    if config.micro_batch_tokens != "auto":
        micro_batch_tokens = config.micro_batch_tokens
    elif micro_batch_tokens is None:
        micro_batch_tokens = memory.choose_micro_batch_tokens(shape, method, max(lengths, default=1))
        micro_batch_tokens = int(world.min(micro_batch_tokens))  # of what the ranks would choose
        say(f"micro-batches of {micro_batch_tokens} tokens fit into the free memory")
    trainer = TrainerConfig.of(config, micro_batch_tokens=micro_batch_tokens)
    steps = trainer.plan(lengths, mixture.plans)
    assert not source.partial or (len(steps) == config.max_steps and steps[-1].epoch < 1), "too few rows were read"
    check_ranks(steps, sharded, world)
    if config.phases and (uneven := uneven_turns(steps, config.phases, mixture.plans[0].count)):
        say(f"note: {uneven}")
    planned = plan_memory(shape, method, mixture.examples, steps, micro_batch_tokens)
    folders, (dtype, device) = epoch_folders(config, steps), (method.dtype, method.device)
    return RunPlan(
        *(config, model, method.lora, mixture, validation, max_length, dtype, device, trainer, planned, folders),
        *(reference, sharded),
    )


def plan_memory(
    shape: DecoderConfig, method: Method, examples: Sequence[Example], steps: Sequence[Step], micro_batch_tokens: int
) -> MemoryPlan:
    """Memory, steps and tokens of a run that takes these steps."""
    largest = largest_micro_batch(examples, (step.examples for step in steps), micro_batch_tokens)
    lengths = lengths_of(examples)
    tokens = sum(lengths[i] for i in taken_by(steps))
    planned = memory.plan_memory(shape, method, micro_batch_tokens, largest)
    return dataclasses.replace(planned, steps=len(steps), tokens=tokens)


def _read(config: TrainConfig, source: Source, model: OpenModel, max_length: int) -> tuple[Mixture, Validation]:
    """Encode training and validation data, and say what became of them."""
    prompt_format, how = model.prompt_format, (max_length, config.too_long, config.train_on)
    if source.partial:
        steps = f"all that {config.max_steps} steps need; the rest is not looked at"
        say(f"{source.name}: the first {len(source.conversations)} rows are read, {steps}")
    elif reason := reads_all(config):
        say(f"note: all rows are read before the first step, as {reason}")
    read = read_others(config, source)
    refuse(check_run_rows(config, read), config.allow)
    asked, held_out = read.training, read.validation
    say(f"encoding {sum(len(a.source.conversations) for a in asked)} conversations; {prompt_format.described}")
    for each in [*(a.source for a in asked), *([held_out] if held_out else [])]:
        if each.note:
            say(f"{each.name}: {each.note}")
    for line in selection_notes(asked):
        say(line)
    mixture = mix(asked, prompt_format, *how)
    for c in mixture.records:
        under = f" under {c.template.name}" if c.template else ""
        say(
            f"{c.name}{under}, {c.epochs:g} epochs: {c.examples} examples, {c.tokens} tokens, {c.trained_tokens} of "
            f"them trained; {c.dropped} dropped, {c.cut} cut, {c.token_boundaries} token boundaries"
        )
    if held_out is None:
        return mixture, Validation()
    examples, record = prepare(held_out, prompt_format, *how)
    check_not_empty(examples, held_out.name)
    return mixture, Validation(held_out, examples, dataclasses.replace(record, name=absolute(held_out.name)))


def epoch_folders(config: TrainConfig, steps: Sequence[Step]) -> dict[int, str]:
    """By step, the folder in the run that gets what is trained by then. Raises UserError for epochs that are not
    reached, and for two of the same step."""
    folders: dict[int, str] = {}
    for epochs in config.at_epochs:
        # A step's `epoch` is where it begins, so the one before it has reached that far.
        reached = next((i for i, s in enumerate(steps) if i and s.epoch >= epochs - 1e-9), len(steps))
        ends_before = reached == len(steps) and (config.max_steps == reached or epochs > config.epochs)
        if epochs <= 0 or ends_before:
            within = f" {epochs:g} must be above 0 and within the run's {len(steps)} steps"
            raise UserError((Setting("at_epochs"), within))
        if reached in folders:
            same = f": {folders[reached]} and epoch-{epochs:g} are the same step, {reached} of {len(steps)}"
            raise UserError((Setting("at_epochs"), same), "leave one out")
        folders[reached] = f"epoch-{epochs:g}"
    return folders
