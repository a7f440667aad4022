"""The contrasts of the study "Cure or condition?", fixed before its confirmation was measured (docs/ladder.md).

All compare attack success rates. A `Pair` compares two trainings. A `Within` compares two prompts of one training: what
was lost of the aligned model's safety under the one, minus what was lost under the other, because the aligned model
itself is not equally safe under both. A `Slope` is the change of that loss per unit of distance over a ladder.

Contrasts come in groups, and Holm's correction is over those of a group that a study has cells for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptst.defense_names import NONE

PURE, SAFE, CONTROL = "chat:vanilla", "chat:llama", "chat:placebo"
PTST = "system-100"  # the rung of chat:vanilla that is PTST's test prompt
DISTANCE = "edit_share"  # the measure of distance of the slopes, and of the figure
PRIMARY, PROMPTS = "primary", "prompts of one model"
_NEUTRAL = ("identical", "placebo")
HOME, BESIDE = "defences under the training prompt", "defences beside PTST"


@dataclass(frozen=True)
class At:
    """A place on a ladder: trained under a template with a defence, tested on a rung of that template."""

    train: str
    rung: str
    defense: str = NONE

    def __str__(self) -> str:
        defended = "" if self.defense == NONE else f" with {self.defense}"
        return f"{self.train}{defended} at {self.rung}"


@dataclass(frozen=True)
class Pair:
    """`first` minus `second`, which are other trainings, with the question that it answers."""

    name: str
    question: str
    first: At
    second: At
    group: str = PRIMARY

    @property
    def words(self) -> str:
        return f"{self.first} - {self.second}"


@dataclass(frozen=True)
class Within:
    """What is lost at rung `first` minus what is lost at rung `second`, of the same models."""

    name: str
    question: str
    train: str
    first: str
    second: str
    group: str = PROMPTS

    @property
    def words(self) -> str:
        return f"loss of {self.train}: {self.first} - {self.second}"


@dataclass(frozen=True)
class Slope:
    """Change of the loss per unit of distance along a ladder."""

    name: str
    question: str
    train: str
    group: str = PROMPTS

    @property
    def words(self) -> str:
        return f"slope of the loss over the ladder of {self.train}"


Registered = Pair | Within | Slope


def registered(defenses: Sequence[str]) -> list[Registered]:
    """The contrasts of a study of these defences."""
    home, ptst, pure = At(SAFE, "identical"), At(PURE, PTST), At(PURE, "identical")
    found: list[Registered] = [
        Pair("ptst", "Does leaving the safety prompt out of training protect the test with it?", home, ptst),
        Pair("bare", "Does training under another prompt protect the bare one?", pure, At(SAFE, "system-0")),
        Pair("neutral", "Does it protect a neutral prompt?", At(CONTROL, "identical"), At(PURE, "placebo")),
        Within("context", "Does a neutral text lose less than the safety prompt of training?", SAFE, *_NEUTRAL),
        Within("words", "Does a neutral text lose more than PTST's prompt?", PURE, "placebo", PTST),
        Within("paraphrase", "Do other words lose less than those of training?", SAFE, "identical", "paraphrase"),
        Slope("distance-safe", "Does the loss fall with the distance from the training prompt?", SAFE),
        Slope("distance-pure", "The same after training without the safety prompt", PURE),
    ]
    for name in (name for name in defenses if name != NONE):
        protected = At(SAFE, "identical", name)
        question = f"Does {name} protect under the training prompt itself?"
        found.append(Pair(f"{name}-home", question, home, protected, HOME))
        found.append(Pair(f"{name}-ptst", f"Is PTST safer than {name} under the same prompt?", protected, ptst, BESIDE))
    return found
