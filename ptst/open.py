"""The model under test: folder, shape and prompt format of a model, or of a run over its base model. Everything opens
models here, so that a conversation by hand reads exactly what the measured prompts read, and what training read."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ptst.errors import Setting, UserError
from ptst.fingerprints import tokenizer_fingerprint, weights_fingerprint
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import load_adapter, merge_lora
from ptst.model.weights import load_decoder
from ptst.progress import say
from ptst.records import (
    CHECKPOINTS,
    TrainRecord,
    find_record,
    latest_run,
    read_finished,
    record_kind,
)
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.templates import Template, find_template, with_default_system_prompt


@dataclass(frozen=True)
class OpenModel:
    """A model without its weights: `folder` is that of the base model; `checkpoint` the run folder, with its record in
    `run`, where a run is meant."""

    name: str
    folder: Path
    config: DecoderConfig
    prompt_format: PromptFormat
    checkpoint: Path | None = None
    run: TrainRecord | None = None

    @property
    def described(self) -> str:
        """`run checkpoints/a (trained under chat:vanilla)` or `model b`. A folder of fully fine-tuned weights is a run,
        also where it was opened as a model."""
        folder, run = self.checkpoint or self.folder, self.run
        kind: str | None = None
        with suppress(UserError):  # a model folder serves, whatever the record in it is worth
            run, kind = run or find_record(folder, TrainRecord), record_kind(folder)
        if run is not None:
            return f"run {folder} (trained under {run.template.name})"
        return f"model {self.name}" + " (made by ptst.align)" * (kind == "align")

    def with_template(self, template: str | Template) -> "OpenModel":
        """The same model under another template. Raises UserError for an unknown one."""
        template = with_default_system_prompt(find_template(template), self.folder)
        return replace(self, prompt_format=replace(self.prompt_format, template=template))

    def load_base(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
        """The base model's decoder, frozen."""
        return load_decoder(self.folder, dtype, device)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu", base: Decoder | None = None) -> Decoder:
        """The decoder of the run, or of the base model where there is none. An adapter is attached to `base` where that
        is given, which is then used up."""
        if self.checkpoint is None or self.run is None:
            return self.load_base(dtype, device)
        if self.run.full:
            return load_decoder(self.checkpoint, dtype, device)
        decoder = self.load_base(dtype, device) if base is None else base
        load_adapter(decoder, self.checkpoint)
        if dtype == torch.float32:
            merge_lora(decoder)  # exact enough in float32, and faster; a bfloat16 base keeps the adapter unmerged
        return decoder


def open_model(
    model: str | None = None,
    template: str | Template = "chat:plain",
    *,
    checkpoint: Path | None = None,
    family: str | None = None,
    chat_format: str | None = None,
    allow_role_markers: bool = True,
) -> OpenModel:
    """Open `model` (the embedded name, a folder, a hub id), or the run in `checkpoint`; with neither, the latest run.

    `family` None: the run's, or plain. `chat_format` None: the run's, or the folder's own. `allow_role_markers`:
    messages may hold the format's role markers (at test time an attack to be measured, in training a mistake).
    Raises UserError for what is not there, and for an adapter of other weights than the base has now.
    """
    checkpoint, run = find_run(checkpoint, model)
    name = run.model if run else str(model)
    recorded = Path(run.model_folder) if run else Path()
    folder = recorded if run and (recorded / "config.json").exists() else locate_model(name, CHECKPOINTS)
    if checkpoint and run:
        check_base(checkpoint, run, folder)
    config = DecoderConfig.from_folder(folder)
    family = family or (run.family.name if run else "plain")
    prompt_format = open_prompt_format(
        folder,
        find_template(template),
        family,
        chat_format or (run.chat_format if run else None),
        vocab_size=config.vocab_size,
        allow_role_markers=allow_role_markers,
    )
    return OpenModel(name, folder, config, prompt_format, checkpoint, run)


def check_base(checkpoint: Path, run: TrainRecord, folder: Path) -> None:
    """Raise UserError for an adapter of other weights than those in `folder`; say so where the tokenizer's files are
    others than in training."""
    if not run.full and not weights_fingerprint(folder).matches(run.weights):
        cause = f"the adapter in {checkpoint} was trained on other weights than {folder} holds now"
        raise UserError(cause, "put those back, or train again")
    if run.tokenizer not in (None, tokenizer_fingerprint(folder)):
        say(f"note: tokenizer, chat template or end tokens in {folder} have changed since {checkpoint} was trained")


def find_run(checkpoint: Path | None, model: str | None) -> tuple[Path | None, TrainRecord | None]:
    """The run that is meant and its record: the one given, the latest one where nothing is given, or (None, None) for
    a base `model`. Raises UserError when both are given, or there is no finished run."""
    if checkpoint is not None and model is not None:
        cause = (Setting("checkpoint"), " and ", Setting("model"), " exclude each other")
        raise UserError(cause, "a run knows its base model")
    if model is not None:
        return None, None
    checkpoint = checkpoint or latest_run(CHECKPOINTS)
    return checkpoint, read_finished(checkpoint)
