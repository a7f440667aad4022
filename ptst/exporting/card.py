"""The model card, README.md: front matter as the hub reads it, and what whoever uses the files must know.

Only what the run's record, its evaluations and the export itself say. The licence is never guessed; no path of this
machine, no answer of the model and no row of data is in it.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ptst import __version__
from ptst.exporting.base_name import BaseName, find_base_name
from ptst.exporting.data_names import data_name, dataset_id
from ptst.exporting.results import Measured, find_results
from ptst.fingerprints import weights_fingerprint
from ptst.open import find_run, run_folder
from ptst.progress import printable
from ptst.records import DataRecord, TrainRecord
from ptst.settings import NO_EFFECT, CommandSettings
from ptst.text.templates import Family, Template
from ptst.training.config import TrainConfig

README = "README.md"
Kind = Literal["adapter", "merged", "full", "copy", "template"]
RELATIONS = {"adapter": "adapter", "merged": "finetune", "full": "finetune"}  # to the base, in the hub's words
_OF_ADAPTERS, _OF_FULL = ("rank", "alpha", "dropout", "target_modules"), ("weight_update",)
# Told elsewhere in the card, or names of this machine.
_NOT_SHOWN = {"template", "model", "data", "val_data", "mix", "allow", "columns", "ignore_columns", "recipe", "dtype"}


@dataclass(frozen=True)
class BakedTemplate:
    """A prompt format written as `chat_template.jinja`. `proof`: what was compared, in words; `differences`: known ones
    between the file and ptst's own rendering; `settings`: what tokenizer_config.json must say for the proof."""

    template: Template
    family: Family
    chat_format: str
    jinja: str = dataclasses.field(repr=False)
    proof: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    settings: Mapping[str, bool] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class CardFacts:
    """What a card says. `kind`: an adapter, a base with an adapter merged in, all weights fine-tuned, a copy of a model
    as it is, or a chat template alone. `name`: the title. `step`: the optimizer step of the weights, if not the last.
    `dtype`: of the weights in the files. `agreement`: sentences of the comparison with the run. `defended`: how
    ptst.defend computed the weights, if it did."""

    kind: Kind
    name: str
    base: BaseName
    run: TrainRecord | None = None
    step: int | None = None
    results: tuple[Measured, ...] = ()
    baked: BakedTemplate | None = None
    agreement: tuple[str, ...] = ()
    dtype: str | None = None
    rank: int | None = None
    license: str | None = None
    defended: str | None = None


def model_card(facts: CardFacts) -> str:
    """The card as markdown with its front matter."""
    run, baked = facts.run, facts.baked
    templates = [("Training", run.template, run.family, run.chat_format)] if run else []
    for name, record in _data(run) if run else ():
        if run is not None and record.template is not None:
            templates.append((f"Training on {name}", record.template, run.family, run.chat_format))
    if baked is not None:
        templates.append(("Test", baked.template, baked.family, baked.chat_format))
    text = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            facts=facts,
            templates=templates,
            data=_data(run) if run else (),
            allowed=_allowed(run) if run else (),
            settings=_settings(run) if run else {},
            versions=_versions(run),
            version=__version__,
            ready=baked is not None,
        )
    )
    return f"---\n{_front_matter(facts)}\n---\n\n{text.strip()}\n"


def run_card(folder: Path, base_name: str | None = None, license: str | None = None) -> str:
    """The card of a run's folder as it is (RUN, RUN/epoch-1, RUN/best or RUN/state/step-00000050). Raises UserError for
    what is no finished run, and for a `base_name` that is no hub id."""
    checkpoint, run = find_run(folder, None)
    assert checkpoint is not None and run is not None
    base = find_base_name(run.model, Path(run.model_folder), base_name)
    results = find_results(checkpoint, weights_fingerprint(checkpoint))
    kind: Kind = "full" if run.full else "adapter"
    rank = None if run.full else run.settings.get("rank")
    name = checkpoint.resolve().name if checkpoint == run_folder(checkpoint) else run_folder(checkpoint).resolve().name
    facts = CardFacts(kind, name, base, run, results=results, rank=rank, license=license)
    return model_card(facts)


def _front_matter(facts: CardFacts) -> str:
    """The YAML block. What is not known is a comment that says so."""
    from huggingface_hub import ModelCardData

    data = (facts.run.data, *facts.run.mix) if facts.run else ()
    tags = ["ptst", *(["lora"] if facts.kind in ("adapter", "merged") else []), "conversational"]
    relation: dict[str, Any] = {}
    if facts.base.id and facts.kind in RELATIONS:
        relation = {"base_model_relation": RELATIONS[facts.kind]}
    card = ModelCardData(
        base_model=facts.base.id,
        datasets=[*dict.fromkeys(found for record in data if (found := dataset_id(record.name)))] or None,
        library_name={"adapter": "peft", "template": None}.get(facts.kind, "transformers"),
        license=facts.license,
        pipeline_tag="text-generation",
        tags=tags,
        **relation,
    )
    lines = [card.to_yaml(line_break="\n")]
    if facts.license is None:
        lines.append("# license: to be filled in, that of the base model and the data allow which ones")
    if facts.base.id is None:
        lines.append("# base_model: to be filled in, as org/name")
    return "\n".join(lines)


def _data(run: TrainRecord) -> list[tuple[str, DataRecord]]:
    """Each source of training examples under the name that others may read, the main one first."""
    return [(data_name(record.name), record) for record in (run.data, *run.mix)]


def _allowed(run: TrainRecord) -> list[str]:
    """The rules of the audit that the run was allowed to break."""
    allowed = run.settings.get("allow") or ()
    return [str(rule) for rule in allowed]


def _settings(run: TrainRecord) -> dict[str, str]:
    """The settings on which the weights depend, those that are off left out."""
    shown: dict[str, str] = {}
    for f in dataclasses.fields(TrainConfig):
        value = run.settings.get(f.name)
        off = value in (None, False, "", "none", [], ())
        own = f.name in {g.name for g in dataclasses.fields(CommandSettings)} or f.metadata == NO_EFFECT
        skipped = f.name in _NOT_SHOWN or f.name.endswith("_file") or f.name in (_OF_ADAPTERS if run.full else _OF_FULL)
        if not (off or own or skipped):
            shown[f.name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown


def _versions(run: TrainRecord | None) -> dict[str, str]:
    """Of the libraries that trained, by name."""
    found: Mapping[str, Any] = run.environment.get("versions") or {} if run else {}
    return {name: str(value) for name, value in found.items() if value}


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=_written,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"block": _block, "cell": _cell}
    return environment


class _Block(str):
    """Lines that stay lines."""


def _written(value: object) -> object:
    """A value as the card has it: a name is one line, whatever is in it, and so opens no heading or list."""
    if not isinstance(value, str):
        return value
    return printable(value if isinstance(value, _Block) else " ".join(value.splitlines()))


def _block(text: str) -> _Block:
    """Text as it is, in a fence that nothing in it closes."""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return _Block(f"{fence}text\n{text}\n{fence}")


def _cell(text: object) -> str:
    """Text in a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
