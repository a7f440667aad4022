"""The rungs of a grid: made from each of its training templates, and tested on the runs of that template alone (the
base model on all), next to the grid's other test templates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptst.experiment.ladder.formats import another_format
from ptst.experiment.ladder.rungs import Rung, read_paraphrases, rungs
from ptst.open import OpenModel
from ptst.progress import say
from ptst.text.segments import Conversation
from ptst.text.templates import Family, Template

Rungs = Mapping[str, Rung]  # by their full names


def read_ladder(
    names: Sequence[str],
    trained: Sequence[Template],
    family: Family,
    rows: Sequence[Conversation],
    paraphrases: Path | None = None,
    hosted: bool = False,
) -> dict[str, Rung]:
    """The rungs of each training template; what is left out is said, and paraphrases that are of no use. Raises
    UserError as `rungs` and `read_paraphrases`."""
    own = read_paraphrases(paraphrases) if paraphrases else {}
    if unused := own.keys() - {template.name for template in trained}:
        say(f"note: {paraphrases} has paraphrases of templates that are not trained under: {', '.join(sorted(unused))}")
    found: dict[str, Rung] = {}
    for template in trained if names else ():
        made, left_out = rungs(template, family, names, rows, own, own_format=hosted)
        found |= {rung.full_name: rung for rung in made}
        for sentence in left_out:
            say(f"note: {sentence}")
    return found


def open_rung(model: OpenModel, rung: Rung) -> OpenModel:
    """A model, opened under any template with roles, under a rung."""
    opened = model.with_template(rung.template)
    if rung.chat_format is None:
        return opened
    return replace(opened, prompt_format=another_format(opened.prompt_format))


def described(rungs: Rungs) -> dict[str, Any]:
    """What results.json says of the rungs, in their order."""
    return {name: {"training": r.training, "rung": r.name, "sentence": r.sentence} for name, r in rungs.items()}
