"""The model under test: folder, shape and prompt format of a model, or of a run or an adapter over its base model.
Everything opens models here, so that a conversation by hand reads exactly what the measured prompts read, and what
training read."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ptst.config_file import read_config
from ptst.errors import Setting, UserError
from ptst.fingerprints import tokenizer_fingerprint, weights_fingerprint
from ptst.hub.locate import locate_adapter, locate_model
from ptst.model.adapter_files import CONFIG, adapter_matrices, read_lora_config
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import load_adapter, merge_lora, target_weights
from ptst.model.quantized import Quantization, described_dtype
from ptst.model.weights import load_decoder
from ptst.progress import say, say_once
from ptst.records import (
    CHECKPOINTS,
    EXPORT,
    FILE,
    TrainRecord,
    find_record,
    latest_run,
    read_finished,
    read_json,
    read_record,
    record_kind,
)
from ptst.text.chat_formats import NO_CHAT_FORMAT
from ptst.text.chat_template import read_chat_template
from ptst.text.detect import find_format
from ptst.text.guard import LLAMA_GUARD, judge_kind_of
from ptst.text.prompt_format import PromptFormat, check_used, open_prompt_format
from ptst.text.templates import FAMILIES, Template, find_template, with_default_system_prompt
from ptst.training.checkpoint import list_checkpoints, load_weights
from ptst.training.config import TrainConfig


@dataclass(frozen=True)
class OpenModel:
    """A model without its weights: `folder` is that of the base model; `checkpoint` the run folder, with its record in
    `run`, where a run is meant; `adapter` the folder of an adapter of somebody else's, and its name as it was given.
    `quantized`: how the base's projections are rounded when it is loaded; None: as the run was trained."""

    name: str
    folder: Path
    config: DecoderConfig
    prompt_format: PromptFormat
    checkpoint: Path | None = None
    run: TrainRecord | None = None
    adapter: Path | None = None
    adapter_name: str | None = None
    quantized: str | None = None

    @property
    def quantize(self) -> str:
        """How the base's projections are rounded: none, nf4 or int8."""
        return self.quantized or (self.run.quantize if self.run is not None else "none")

    def dtype_name(self, dtype: torch.dtype) -> str:
        """What the weights are computed in, for records: `float32`, or `float32, base in nf4`."""
        return described_dtype(dtype, self.quantize)

    @property
    def described(self) -> str:
        """`run checkpoints/a (trained under chat:vanilla)`, `model b` or `model b with the adapter c`. A folder of
        fully fine-tuned weights is a run, also where it was opened as a model."""
        if self.adapter is not None:
            return f"model {self.name} with the adapter {self.adapter_name}"
        folder, run = self.checkpoint or self.folder, self.run
        kind: str | None = None
        with suppress(UserError):  # a model folder serves, whatever the record in it is worth
            run, kind = run or find_record(folder, TrainRecord), record_kind(folder)
        if run is not None:
            return f"run {folder} (trained under {run.template.name})"
        return f"model {self.name}" + (f" (made by ptst.{kind})" if kind in ("align", "defend") else "")

    @property
    def is_state(self) -> bool:
        """Whether the weights are those of a step from which training can be resumed."""
        return self.checkpoint is not None and run_folder(self.checkpoint) != self.checkpoint

    @property
    def step(self) -> int | None:
        """The optimizer step after which the weights were as they are; None for a base model."""
        if self.is_state:
            assert self.checkpoint is not None
            return int(self.checkpoint.name.removeprefix("step-"))
        return self.run.steps if self.run else None

    def with_template(self, template: str | Template) -> "OpenModel":
        """The same model under another template. Raises UserError for an unknown one."""
        template = with_default_system_prompt(find_template(template), self.folder)
        prompt_format = replace(self.prompt_format, template=template)
        if prompt_format.chat_format is NO_CHAT_FORMAT and not template.is_text:
            own = find_format(self.folder, prompt_format.tokenizer)
            prompt_format = replace(prompt_format, chat_format=own.chat_format, found=own.how)
        return replace(self, prompt_format=prompt_format)

    def load_base(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
        """The base model's decoder, frozen, and rounded as `quantize` says. Raises UserError where that needs a package
        that is missing."""
        if self.quantize != "none":
            why = "as in training" if self.quantized is None else "as asked"
            say_once(f"note: the projections of {self.name} have the values that {self.quantize} gives them, {why}")
        return load_decoder(self.folder, dtype, device, Quantization.of(self.quantize))

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        base: Decoder | None = None,
        merge: bool | None = None,
    ) -> Decoder:
        """The decoder of the run, of the adapter, or of the base model where there is none. An adapter is attached to
        `base` where that is given, which is then used up. `merge`: into the base's weights; None: under float32 alone.
        Raises UserError for files that are damaged or do not fit."""
        if self.checkpoint is not None and self.run is not None and self.run.full and not self.is_state:
            return load_decoder(self.checkpoint, dtype, device)
        adapter = self.adapter or (self.checkpoint if self.run else None)
        if adapter is None:
            return self.load_base(dtype, device)
        decoder = self.load_base(dtype, device) if base is None else base
        if self.checkpoint is not None and self.is_state:
            c = read_config(run_folder(self.checkpoint) / FILE, TrainConfig(), "train")
            load_weights(decoder, self.checkpoint, c.lora)
        else:
            load_adapter(decoder, adapter)
        if self.run is not None and self.run.full:
            return decoder
        if dtype == torch.float32 if merge is None else merge:
            merge_lora(decoder)  # exact enough in float32, and faster; a bfloat16 base keeps the adapter unmerged
        return decoder


def open_model(
    model: str | None = None,
    template: str | Template = "chat:plain",
    *,
    checkpoint: Path | None = None,
    adapter: Path | str | None = None,
    family: str | None = None,
    chat_format: str | None = None,
    allow: Collection[str] = ("role-markers",),
) -> OpenModel:
    """Open `model` (the embedded name, a folder, a hub id), or the run in `checkpoint`; with neither, the latest run.
    `adapter`: a LoRA adapter of `model` in PEFT's layout, whoever made it; a folder or a hub id.

    `family` None: that of the training data, plain where these are unknown. `chat_format` None: the run's, or the
    folder's own. `allow`: what need not hold: role-markers (messages may hold the format's role markers, at test time
    an attack to be measured, in training a mistake), chat-template (the chat format may be another than the folder's).
    Raises UserError for what is not there, for a `chat_format` under a `text:` template, for a run's adapter of other
    weights than the base has now, and for an adapter that is not supported or does not fit.
    """
    template = find_template(template)
    check_used(chat_format, template)
    checkpoint, run = find_run(checkpoint, model, adapter)
    name = run.model if run else str(model)
    recorded = Path(run.model_folder) if run else Path()
    folder = recorded if run and (recorded / "config.json").exists() else locate_model(name, CHECKPOINTS)
    if checkpoint and run:
        check_base(checkpoint, run, folder)
    config = DecoderConfig.from_folder(folder)
    if not template.is_text and not (chat_format and "chat-template" in allow):
        check_chat_model(name, folder)
    own = None if adapter is None else locate_adapter(adapter)
    if own is not None:
        if find_record(own, TrainRecord) is not None:
            raise UserError(f"{own} is a run of ptst.train", ("give it as ", Setting("checkpoint")))
        check_adapter(own, config, name, folder)
    family = family or trained_family(run, name) or "plain"
    prompt_format = open_prompt_format(
        folder,
        template,
        family,
        chat_format or (run.chat_format if run else None),
        vocab_size=config.vocab_size,
        allow_role_markers="role-markers" in allow,
        allow_chat_template="chat-template" in allow,
    )
    adapter_name = None if adapter is None else str(adapter)
    return OpenModel(name, folder, config, prompt_format, checkpoint, run, own, adapter_name)


def check_chat_model(name: str, folder: Path) -> None:
    """Raise UserError for a guard model, which judges answers instead of giving them; say so of a classifier that has
    no chat template to tell it."""
    kind = judge_kind_of(folder)
    usage = (Setting("judge"), f" {kind}:{name}")
    if kind == LLAMA_GUARD:
        cause = f"{name} is a guard model: its chat template asks whether an exchange is safe, instead of continuing it"
        raise UserError(cause, ("use it to judge answers: ptst.eval with ", *usage, ", or ask it in a text: template"))
    if kind is not None:
        say(f"note: {name} looks like a classifier of answers, which serves as the judge {kind}:{name}")


def check_base(checkpoint: Path, run: TrainRecord, folder: Path) -> None:
    """Raise UserError for an adapter of other weights than those in `folder`; say so where the tokenizer's files are
    others than in training."""
    if not run.full and not weights_fingerprint(folder).matches(run.weights):
        cause = f"the adapter in {checkpoint} was trained on other weights than {folder} holds now"
        raise UserError(cause, "put those back, or train again")
    if run.tokenizer not in (None, tokenizer_fingerprint(folder)):
        say(f"note: tokenizer, chat template or end tokens in {folder} have changed since {checkpoint} was trained")


def trained_family(run: TrainRecord | None, model: str | None) -> str | None:
    """The template family of what was trained on: by the run, or where `model` is a folder of fully fine-tuned weights
    or one that ptst.export or ptst.defend made. None where nothing is known."""
    if run is None and model is not None:
        with suppress(UserError, OSError):  # a model folder serves, whatever the record in it is worth
            run = find_record(Path(model), TrainRecord)
            for name in (EXPORT, FILE) if run is None else ():
                values = read_json(Path(model) / name) if (Path(model) / name).exists() else None
                if isinstance(values, dict) and isinstance(values.get("training"), dict):
                    family = values["training"].get("family")
                    return family if family in FAMILIES else None
    return run.family.name if run else None


def check_adapter(adapter: Path, config: DecoderConfig, name: str, folder: Path) -> None:
    """Raise UserError for an adapter that is not supported or does not fit a model of this shape; say so where it names
    another base model than `name`, modules that the model lacks, or comes with another chat template."""
    described = read_lora_config(adapter)
    with torch.device("meta"):
        weights = target_weights(Decoder(config))
    adapter_matrices(adapter, described, {projection: tuple(w.shape) for projection, w in weights.items()})
    if described.base and Path(described.base).name.lower() not in {Path(n).name.lower() for n in (name, folder)}:
        say(f"note: {adapter} names {described.base} as its base model, not {name}")
    if lacking := described.without_place(weights):
        say(f"note: {adapter} has targets that {name} lacks, which are passed over, as peft does: {', '.join(lacking)}")
    if (own := _chat_template(adapter)) is not None and own != _chat_template(folder):
        say(f"note: {adapter} comes with another chat template than {name} has; the model's own is used")


def _chat_template(folder: Path) -> str | None:
    with suppress(UserError):  # whoever uses it will report it
        return read_chat_template(folder)
    return None


def find_run(
    checkpoint: Path | None, model: str | None, adapter: Path | str | None = None
) -> tuple[Path | None, TrainRecord | None]:
    """The run that is meant and its record: the one given, the latest one where nothing is given, or (None, None) for
    a base `model`. Raises UserError for settings that exclude each other, for an `adapter` without `model`, and where
    there is no finished run. `checkpoint` is the folder of a finished run, or RUN/state/step-00000050 of any run."""
    if adapter is not None and model is None:
        base = read_lora_config(locate_adapter(adapter)).base
        named = f" (the adapter says {base})" if base else ""
        cause = (Setting("adapter"), " needs ", Setting("model"), ", its base model")
        raise UserError(cause, f"name it{named}")
    if checkpoint is not None and model is not None:
        cause = (Setting("checkpoint"), " and ", Setting("model"), " exclude each other")
        raise UserError(cause, "a run knows its base model")
    for setting, folder in (("checkpoint", checkpoint), ("model", model and Path(model))):
        if folder and (folder / CONFIG).exists() and not any((folder / n).exists() for n in (FILE, "config.json")):
            remedy = ("give it as ", Setting("adapter"), ", and its base model as ", Setting("model"))
            raise UserError((Setting(setting), f" {folder} is an adapter"), remedy)
    if model is not None:
        return None, None
    checkpoint = checkpoint or latest_run(CHECKPOINTS)
    if (run := run_folder(checkpoint)) != checkpoint:
        return checkpoint, read_record(run, TrainRecord)
    saved = list_checkpoints(run / "state")
    if saved and read_record(run, TrainRecord).status != "finished":
        offer = ("resume it first, or take its last checkpoint: ", Setting("checkpoint"), f" {saved[-1]}")
        raise UserError(f"{run} is not a finished training run", offer)
    return checkpoint, read_finished(checkpoint)


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of: RUN for RUN/state/step-00000050, else the checkpoint itself."""
    whole = checkpoint if len(checkpoint.parts) > 2 else checkpoint.absolute()
    in_state = whole.parent.name == "state" and (whole / "state.json").exists()
    return whole.parent.parent if in_state else checkpoint
