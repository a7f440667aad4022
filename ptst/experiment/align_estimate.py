"""What alignments that come first would take: tokens by the tokenizer, time from those that have finished."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from ptst.data.builtin import alignment_set
from ptst.evaluation.tasks.table import TASKS
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import BARE, OPENING, OWN, SAFE, AlignRecord
from ptst.experiment.estimate import Estimate
from ptst.experiment.status.items import Item
from ptst.open import OpenModel, open_model
from ptst.records import find_record
from ptst.text.prompt_format import PromptFormat
from ptst.text.segments import Conversation

STEPS = 30  # about as many as the default model needs before it meets the stopping rule; others may need more
_BACKWARD = 3  # times the products of a forward pass, where all weights are trained


def estimate_alignments(config: AlignConfig, folders: Iterable[Path], rough: float | None) -> list[Estimate]:
    """An estimate of the alignment into each folder. `rough`: seconds of a token's products in one forward pass, None
    without the model's files."""
    records = {folder: find_record(folder, AlignRecord) for folder in folders}
    done = {f: record for f, record in records.items() if record is not None and record.status == "finished"}
    times = [record.time["seconds"] for record in done.values() if record.time]
    read, trained = (None, None) if rough is None else _tokens(config)
    tokens = None if read is None or trained is None else read + trained
    if times:
        seconds: float | None = median(times)
    elif rough is None or read is None or trained is None:
        seconds = None
    else:
        seconds = rough * (read + _BACKWARD * trained)
    return [
        Estimate(f"align {f.name}", f in done, tokens, 0.0 if f in done else seconds, not times, None) for f in records
    ]


def alignment_items(config: AlignConfig, folders: Sequence[Path]) -> dict[str, tuple[Item, Path]]:
    """The alignments into these folders as what there is to do, of about as many steps as the default model needs."""
    read, trained = _tokens(config)
    items = (Item("align", f.name, fixed=float(read + _BACKWARD * trained), parts=STEPS) for f in folders)
    return {item.what: (item, folder) for item, folder in zip(items, folders, strict=True)}


def _tokens(config: AlignConfig) -> tuple[int, int]:
    """Tokens read or written without training, and trained on, in STEPS steps. Every own answer counts as long as it
    may be, and every evaluation as a whole one."""
    family, chat_format, allowed = config.template_family, config.chat_format, ("role-markers", *config.allow)
    models = {
        name: open_model(config.model, name, family=family, chat_format=chat_format, allow=allowed)
        for name in (SAFE, BARE)
    }
    refusals, own, reference = list[int](), list[int](), 0
    for model in models.values():
        refusals += _lengths(model.prompt_format, alignment_set.refusals())
        prompts = [c.prompt() for c in alignment_set.harmless()]
        own += [n + OWN.max_new_tokens for n in _lengths(model.prompt_format, prompts)]
        reference += sum(_lengths(model.prompt_format, alignment_set.reference()))
    mean = (sum(refusals) + config.own_epochs * sum(own)) / (len(refusals) + config.own_epochs * len(own))
    evaluations = 1 + STEPS // config.check_every
    read = config.own_answers * sum(own) + evaluations * (reference + _asked(models))
    return read, round(STEPS * config.examples_per_step * mean)


def _asked(models: dict[str, OpenModel]) -> int:
    """Tokens of the requests that an evaluation asks, and of the openings of their answers."""
    total = 0
    for task, prompts in zip(("safety", "over-refusal"), alignment_set.stopping(), strict=True):
        for model in models.values():
            ids = [p.encode(model.prompt_format).ids for p in TASKS[task].prompts(prompts)]
            total += sum(len(each) + OPENING.max_new_tokens for each in ids)
    return total


def _lengths(prompt_format: PromptFormat, conversations: Iterable[Conversation]) -> list[int]:
    return [len(prompt_format.encode(c).ids) for c in conversations]
