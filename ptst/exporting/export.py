"""An export: a run, an adapter or a model as a folder that other programs load, whole or absent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ptst import __version__
from ptst.defend_record import find_told
from ptst.errors import Setting, UserError
from ptst.exporting.agreement import Agreement, Observed, compare, observe, prompts_of
from ptst.exporting.base_name import BaseName
from ptst.exporting.card import README, BakedTemplate, CardFacts, Kind, model_card
from ptst.exporting.config import ExportConfig
from ptst.exporting.folder import (
    TEMPLATE,
    add_end_tokens,
    check_out,
    copy_small_files,
    new_folder,
    set_in_tokenizer_config,
    update_config,
)
from ptst.exporting.merge import MergedWeights
from ptst.exporting.results import Measured, find_results
from ptst.exporting.shards import write_weights
from ptst.exporting.source import Source, open_source, open_template
from ptst.exporting.template import bake
from ptst.fingerprints import weights_fingerprint
from ptst.model.adapter_files import adapter_matrices, read_lora_config
from ptst.model.weights import load_decoder, pick_device
from ptst.open import OpenModel
from ptst.progress import say
from ptst.records import EXPORT
from ptst.storage import write_atomically, write_json
from ptst.system_memory import free_memory
from ptst.text.chat_template import copy_chat_templates
from ptst.text.prompt_format import PromptFormat
from ptst.text.tokenizer import load_tokenizer
from ptst.threads import choose_threads

_VERSION = 1  # of export.json: what was exported, how it was proven, and how it compares with the run


@dataclass(frozen=True)
class ExportReport:
    """`files`: sizes in bytes, by name. `agreement`: None where nothing was compared; `compared`: why, or the result in
    words. `ends`: ids of end tokens that generation_config.json did not name. `record`: what export.json has."""

    out: Path
    kind: Kind
    files: Mapping[str, int]
    baked: BakedTemplate | None = None
    agreement: Agreement | None = None
    compared: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "files": dict(self.files), **self.record}


class Disagreement(UserError):
    """What was written does not answer as the run does."""


def export_model(config: ExportConfig) -> ExportReport:
    """Write the folder that `config` asks for. Raises UserError for a user's mistakes, before anything is written where
    that can be known, and Disagreement; `out` is then as it was."""
    config.check_settings()
    assert config.out is not None
    check_out(config.out)
    if config.template_only and config.model is not None and config.adapter is None:
        return _export_template(config, *open_template(config))
    source = open_source(config)
    if config.adapter_only:
        source.base.in_adapter_config()  # refused now, if at all
    if config.template_only:
        assert source.test is not None
        return _export_template(config, source.test, source.base)
    choose_threads(config.threads)
    baked = None if source.test is None else bake(source.test)
    return (_export_adapter if config.adapter_only else _export_weights)(config, source, baked)


def _export_weights(config: ExportConfig, source: Source, baked: BakedTemplate | None) -> ExportReport:
    """All weights, an adapter merged in, with config, tokenizer and card."""
    assert config.out is not None
    weights = source.weights(config.dtype)
    prompts = _plan_check(config, source, weights)
    with new_folder(config.out, sum(weights.sizes.values())) as folder:
        say(f"writing {weights.num_parameters:,} parameters in {_dtypes(weights)} to {config.out}")
        write_weights(folder, weights, config.shard_bytes)
        copy_small_files(source.settings_folder, folder, baked.jinja if baked else None)
        set_in_tokenizer_config(folder, baked.settings if baked else {})
        update_config(folder, _main_dtype(weights), always=config.dtype is not None, keep_name=source.kind == "copy")
        ends = add_end_tokens(folder, {each.terminator_id for each in source.formats})
        if ends:
            say(f"generation_config.json gets the end tokens {', '.join(map(str, ends))}, at which ptst stops")
        agreement: Agreement | None = None
        compared: tuple[str, ...] = ("Not compared with the run (--no-check).",)
        if prompts:
            agreement = _check(source, weights, folder, prompts, config.tolerance)
            compared = agreement.sentences
        facts = _facts(source, source.kind, baked, compared, config.license)
        facts = replace(facts, dtype=_dtypes(weights), rank=weights.adapter.rank if weights.adapter else None)
        record = _record(source, facts, dtype=_dtypes(weights), end_tokens_added=ends)
        record["agreement"] = agreement.to_json() if agreement else None
        files = _finish(folder, facts, record)
    return ExportReport(config.out, source.kind, files, baked, agreement, compared, record)


def _export_adapter(config: ExportConfig, source: Source, baked: BakedTemplate | None) -> ExportReport:
    """The adapter alone, with its base named by its hub id; with a template, the tokenizer as well."""
    assert config.out is not None
    adapter = source.adapter()
    with new_folder(config.out, sum(tensor.nbytes for tensor in adapter.tensors.values())) as folder:
        adapter.write(folder, source.base)
        if baked is not None:
            copy_small_files(source.model.folder, folder, baked.jinja, tokenizer_only=True)
            set_in_tokenizer_config(folder, baked.settings)
        else:
            copy_chat_templates(source.model.folder, folder)
        shapes = {name: (len(b_Or), a_rI.shape[1]) for name, (a_rI, b_Or) in adapter.matrices.items()}
        written = adapter_matrices(folder, read_lora_config(folder), shapes)
        for name, pair in adapter.matrices.items():
            assert all(map(torch.equal, pair, written[name])), f"{name} has changed"
        compared = ("Its matrices are those of the run, bit for bit.",)
        facts = replace(_facts(source, "adapter", baked, compared, config.license), rank=adapter.rank)
        record = _record(source, facts)
        files = _finish(folder, facts, record)
    return ExportReport(config.out, "adapter", files, baked, None, compared, record)


def _export_template(config: ExportConfig, prompt_format: PromptFormat, base: BaseName) -> ExportReport:
    """chat_template.jinja alone, with a card that says how it is used."""
    assert config.out is not None
    baked = bake(prompt_format)
    with new_folder(config.out, len(baked.jinja)) as folder:
        write_atomically(folder / TEMPLATE, baked.jinja.encode())
        facts = CardFacts(
            "template", f"{baked.template.name} for {base.shown}", base, baked=baked, license=config.license
        )
        record = _record(None, facts)
        files = _finish(folder, facts, record)
    return ExportReport(config.out, "template", files, baked, record=record)


def _finish(folder: Path, facts: CardFacts, record: Mapping[str, Any]) -> dict[str, int]:
    """Write card and record; returns the sizes of all files."""
    write_atomically(folder / README, model_card(facts).encode(errors="backslashreplace"))
    write_json(folder / EXPORT, record)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _facts(
    source: Source, kind: Kind, baked: BakedTemplate | None, compared: tuple[str, ...], license: str | None
) -> CardFacts:
    model, results = source.model, tuple[Measured, ...]()
    if model.checkpoint is not None:
        results = find_results(model.checkpoint, weights_fingerprint(model.checkpoint))
    step = model.step if model.is_state else None
    facts = CardFacts(kind, source.name, source.base, model.run, step, results, baked, compared, license=license)
    return replace(facts, defended=find_told(model.folder) if kind == "copy" else None)


def _record(source: Source | None, facts: CardFacts, **more: Any) -> dict[str, Any]:
    """What export.json has: no path of this machine, since the folder is made to be given away."""
    base, baked, run = facts.base, facts.baked, facts.run
    test = baked and {
        "template": baked.template.name,
        "family": baked.family.name,
        "chat_format": baked.chat_format,
        "proof": [*baked.proof, *baked.differences],
    }
    return {
        "version": _VERSION,
        "kind": facts.kind,
        "ptst": __version__,
        "name": facts.name,
        "base": {"name": base.shown, "id": base.id, "revision": base.revision}
        | ({"weights": run.weights} if run else {}),
        "run_weights": weights_fingerprint(source.model.checkpoint) if source and source.model.checkpoint else None,
        "step": source.model.step if source else None,
        "training": {"template": run.template.name, "family": run.family.name} if run else None,
        "test": test,
        **more,
    }


def _plan_check(config: ExportConfig, source: Source, weights: MergedWeights) -> list[list[int]]:
    """The prompts of the comparison; none where there is to be no comparison. Raises UserError where the memory is too
    small for it."""
    if not config.check:
        return []
    needed, free = 4 * weights.num_parameters, free_memory(pick_device())
    if needed > free:
        cause = f"comparing with the run takes {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free"
        raise UserError(cause, ("use a larger machine, or skip it: ", Setting("no_check")))
    prompts = prompts_of(source.formats, source.model.config.max_positions)
    if not prompts:
        cause = "no built-in prompt with an answer fits into the model's context"
        raise UserError(cause, ("skip the comparison: ", Setting("no_check")))
    return prompts


def _check(
    source: Source, weights: MergedWeights, folder: Path, prompts: list[list[int]], tolerance: float | None
) -> Agreement:
    """Compare what is in `folder` with the run. Raises Disagreement."""
    say(f"comparing with {source.model.described} on {len(prompts)} prompts, in float32")
    _check_tokenizer(source, folder, prompts)
    stop_ids = source.model.prompt_format.stop_ids
    run = _observe(source.model, prompts, stop_ids, weights.rounded)
    decoder = load_decoder(folder, torch.float32, pick_device())
    agreement = compare(run, observe(decoder, prompts, stop_ids, answers=run.answers), tolerance)
    if not agreement.accepted:
        cause = (
            f"what was written does not answer as the run does: a logit changes by {agreement.largest:.3g}, and "
            f"rounding explains {agreement.tolerance:.3g}"
        )
        if tolerance is not None:
            cause = cause.replace("rounding explains", "the tolerance is")
        remedy = ("write it in float32 with ", Setting("dtype"), " float32, or accept it with ", Setting("tolerance"))
        raise Disagreement(cause, remedy)
    return agreement


def _observe(
    model: OpenModel, prompts: Sequence[list[int]], stop_ids: frozenset[int], rounded: Mapping[str, torch.dtype]
) -> Observed:
    """A function of its own, so that the run's weights are freed before the export's are loaded."""
    decoder = model.load(torch.float32, pick_device(), merge=False).requires_grad_(False)
    return observe(decoder, prompts, stop_ids, rounded=rounded)


def _check_tokenizer(source: Source, folder: Path, prompts: Sequence[list[int]]) -> None:
    """The written tokenizer encodes the prompts as the run's does; anything else is a bug."""
    tokenizer = load_tokenizer(folder, source.model.config.vocab_size)
    formats = []
    for each in source.formats:
        derived = not each.template.is_text and each.chat_format.is_derived
        formats.append(replace(each, tokenizer=tokenizer.like_transformers() if derived else tokenizer))
    assert prompts_of(formats, source.model.config.max_positions) == [*prompts], "the tokenizer has changed"


def _main_dtype(weights: MergedWeights) -> torch.dtype:
    """The type of most of the values."""
    counts: dict[torch.dtype, int] = {}
    for key, each in weights.stored.items():
        counts[weights.dtype_of(key)] = counts.get(weights.dtype_of(key), 0) + each.numel
    return max(counts, key=counts.__getitem__)


def _dtypes(weights: MergedWeights) -> str:
    found = dict.fromkeys(str(weights.dtype_of(key)).removeprefix("torch.") for key in weights.stored)
    return " and ".join(found)
