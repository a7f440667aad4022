"""What is tested: a model, or a run beside its base model, under a test template. Evaluation and chat open it alike, so
that a conversation by hand reads exactly what the measured prompts read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import load_adapter, merge_lora
from ptst.model.weights import load_decoder
from ptst.text.chat_template import with_default_system_prompt
from ptst.text.encode import PromptFormat
from ptst.text.formats import detect_format, stops
from ptst.text.templates import Template, find_family
from ptst.text.tokenizer import load_tokenizer
from ptst.training import run_folder
from ptst.training.resume import weights_fingerprint

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True)
class Subject:
    """`base` is the folder of the untouched model, `checkpoint` the run folder with its `run.json`, if there is one."""

    base: Path
    checkpoint: Path | None
    run: dict[str, Any]
    prompt_format: PromptFormat
    stop_ids: frozenset[int]

    @property
    def described(self) -> str:
        """`chat format chatml, family gsm8k`."""
        text = self.prompt_format.template.is_text
        return f"chat format {'none (text template)' if text else self.prompt_format.chat_format}, family {self.family}"

    @property
    def family(self) -> str:
        return self.prompt_format.family.name

    def untouched(self, dtype: torch.dtype, device: str) -> Decoder:
        """The base model's decoder."""
        return load_decoder(self.base, dtype, device)

    def tuned(self, dtype: torch.dtype, device: str, base: Decoder | None = None) -> Decoder:
        """The run's decoder; an adapter goes onto `base` where that is given, which is then used up."""
        assert self.checkpoint is not None
        if self.run["full"]:
            return load_decoder(self.checkpoint, dtype, device)
        decoder = self.untouched(dtype, device) if base is None else base
        load_adapter(decoder, self.checkpoint)
        if dtype == torch.float32:
            merge_lora(decoder)  # exact enough in float32, and faster; a bfloat16 base keeps it apart
        return decoder


def find_run(checkpoint: Path | None, model: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The run that is meant and its `run.json`: the one given, the latest one where nothing is given, or none (None,
    {}) for an untouched `model`. Raises ValueError when both are given, or there is no finished run."""
    if checkpoint is not None and model is not None:
        raise ValueError("--checkpoint and --model exclude each other: a run knows its base model")
    if model is not None:
        return None, {}
    checkpoint = checkpoint or run_folder.latest_run(CHECKPOINTS)
    return checkpoint, run_folder.read_run(checkpoint)


def open_subject(
    checkpoint: Path | None,
    run: dict[str, Any],
    model: str | None,
    template: Template,
    family: str,
    chat_format: str | None,
) -> Subject:
    """Everything but the weights. `chat_format` None: the run's, or the folder's own. Raises ValueError for a model,
    family or format that is not there, and for an adapter of another base."""
    base = locate_model(run["model_name"] if checkpoint else str(model), CHECKPOINTS)
    if checkpoint and not run["full"] and run.get("weights") not in (None, weights_fingerprint(base)):
        raise ValueError(
            f"the adapter in {checkpoint} was trained on other weights than {base} holds now; put those back, or train "
            f"anew"
        )
    tokenizer = load_tokenizer(base, DecoderConfig.from_folder(base).vocab_size)
    chat_format = chat_format or run.get("chat_format") or detect_format(base, tokenizer)
    template = with_default_system_prompt(template, base)
    # A test prompt with forged role markers is an attack to be measured, not a row to be mended.
    prompt_format = PromptFormat(template, find_family(family), chat_format, tokenizer, allow_role_markers=True)
    return Subject(base, checkpoint, run, prompt_format, stop_ids(base, prompt_format))


def stop_ids(base: Path, prompt_format: PromptFormat) -> frozenset[int]:
    """What ends an answer: of a text template no closing mark of a role."""
    chat_format = None if prompt_format.template.is_text else prompt_format.chat_format
    return frozenset(stops(base, chat_format, prompt_format.tokenizer))
