"""The recipe of the study "Cure or condition?" (docs/ladder.md): PTST beside other defences, over the ladder.

`ladder` is the confirmation: fresh requests, seeds of its own. `ladder-search` tries settings on the requests that stop
the alignment and on other seeds, so that nothing of the confirmation is seen before its hypotheses are fixed. `--quick`
shows the curve of one seed. A study has a grid folder for every alignment, and its training seeds are dealt to the
alignments in turn.
"""

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ptst.defense_names import NONE
from ptst.defenses.config import DefenseSettings
from ptst.errors import Setting, UserError
from ptst.evaluation.config import EvalSettings
from ptst.settings import EMBEDDED_MODEL, NO_EFFECT
from ptst.training.config import TrainSettings

RECIPES = ("ladder", "ladder-search")
TEMPLATES = ("chat:vanilla", "chat:llama")
DEFENSES = (NONE, "mix-safety", "constrained-sft", "ema", "wise-ft", "resta", "safe-lora")
# Of two of the three shortened system prompts and two shuffled ones, one each: they cost as much as any other rung.
RUNGS: tuple[str, ...]
RUNGS = ("identical", "system-100", "system-50", "system-0", "paraphrase", "shuffled-words", "placebo", "opposite")
RUNGS += ("wrapper", "chat-format", "few-shot", "unrelated")
HOME = ("identical", "system-100", "system-0")  # where the tasks are measured that do not ask for safety
SECOND_RUNGS = (*HOME, "placebo")  # of the second training data
CONTROL_RUNGS, CONTROL_TESTS = ("identical", "system-0"), ("chat:llama",)  # of training templates that are controls
EVERYWHERE = ("safety", "margin")
DISTANCE = "distance"
# Alignment seeds an even number apart: each draws its own answers with two seeds (ptst.align --own-answers).
# One seed of training for each: every run is then a sample of the whole way, from the alignment on.
ALIGNMENTS, SEARCH_ALIGNMENTS = (0, 2, 4, 6, 8), (0,)
SEEDS, SEARCH_SEEDS = (20, 21, 22, 23, 24), (100,)
# Of the alignment's stopping rule. With 0.85, ptst.align's own limit, some samples of the model's own answers do not
# meet it: alignment seed 2 refused at most 32 of 40 requests in 55 steps.
REFUSED = 0.75
PROMPTS = 40  # one of each family
NEW_TOKENS = 48
ROWS, DRAWN = 480, 120  # of the training data, and how many of them a seed draws
SECOND = "instructions"
SAFETY_DATA = "refusals:24"  # a sixth of what is trained on


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What only a study has: several alignments, and a second task."""

    alignments: tuple[int, ...] = field(default=(), metadata=NO_EFFECT)
    """Recipe ladder: seeds of ptst.align, a grid for each; the training seeds are dealt to them in turn. None: the
    model is tested as it is."""
    second_data: str | None = field(default=None, metadata=NO_EFFECT)
    """Recipe ladder: other training data, on which the runs without a defence are repeated."""
    control_templates: tuple[str, ...] = field(default=(), metadata=NO_EFFECT)
    """Recipe ladder: further training templates, without a defence, tested under their own prompt, without its system
    prompt, and under chat:llama."""

    def check_study(self, recipe: str | None, seeds: tuple[int, ...]) -> None:
        """Raise UserError for settings of a study elsewhere, and for more alignments than seeds."""
        for name in ("alignments", "second_data", "control_templates"):
            if getattr(self, name) and recipe not in RECIPES:
                raise UserError((Setting(name), f" belongs to the recipes {' and '.join(RECIPES)}"))
        if len(set(self.alignments)) < len(self.alignments):
            raise UserError((Setting("alignments"), " names an alignment twice"), "name each once")
        if len(self.alignments) > len(seeds):
            cause = f"there are {len(self.alignments)} alignments and {len(seeds)} seeds of training"
            raise UserError(cause, ("every alignment needs one: add ", Setting("seeds")))


def values(name: str, quick: bool = False, model: str = EMBEDDED_MODEL) -> dict[str, Any]:
    """GridConfig's fields by a recipe. `quick`: one alignment and seed, no defence but PTST. A `model` other than the
    embedded one is taken as aligned."""
    search = name == "ladder-search"
    prompts = "stopping" if search else "fresh"
    alignments = SEARCH_ALIGNMENTS if search else ALIGNMENTS
    return {
        "train_templates": TEMPLATES,
        "test_templates": (),
        "ladder": RUNGS,
        "defenses": (NONE,) if quick else DEFENSES,
        "tasks": (f"safety:{prompts}", f"over-refusal:{prompts}", "nll:word-problems:10", DISTANCE),
        "alignments": alignments[: 1 if quick else None] if model == EMBEDDED_MODEL else (),
        "seeds": (SEARCH_SEEDS if search else SEEDS)[: 1 if quick else None],
        "data": f"word-problems:{ROWS}",
        "second_data": None if quick or search else SECOND,
        "control_templates": () if quick or search else (placebo_file(),),
        "defense": DefenseSettings(data=SAFETY_DATA),
        # As on a GPU; faster on a CPU that has matrix units for bfloat16.
        "train": TrainSettings(full=True, lr=1e-4, subsample=DRAWN, dtype="bfloat16"),
        "eval": EvalSettings(limit=PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=200, dtype="bfloat16"),
    }


def placebo_file() -> str:
    """The control: trained under a neutral system prompt, which is that of the rung `placebo` of chat:vanilla."""
    return str(resources.files("ptst.experiment.ladder").joinpath("placebo.toml"))
