"""The contrasts of the study "Cure or condition?", fixed before its confirmation was measured (docs/study.md).

Each compares two ways of training and testing by the attack success rate; Holm's correction is over all of them that a
study has cells for. `slope` contrasts ask for safety as a function of distance: the change of the rate per unit of
distance over all rungs of a ladder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptst.defenses.config import NONE

PURE, SAFE = "chat:vanilla", "chat:llama"
PTST = "system-100"  # the rung of pure training with the safety prompt
DISTANCE = "edit_share"  # the measure of distance of the slopes, and of the figure


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
    """`first` minus `second`, with the question that it answers."""

    name: str
    question: str
    first: At
    second: At

    @property
    def words(self) -> str:
        return f"{self.first} - {self.second}"


@dataclass(frozen=True)
class Slope:
    """Change of the rate per unit of distance along a ladder."""

    name: str
    question: str
    train: str
    defense: str = NONE

    @property
    def words(self) -> str:
        defended = "" if self.defense == NONE else f" with {self.defense}"
        return f"slope over the ladder of {self.train}{defended}"


Registered = Pair | Slope


def registered(defenses: Sequence[str]) -> list[Registered]:
    """The contrasts of a study of these defences."""
    home, ptst = At(SAFE, "identical"), At(PURE, PTST)
    found: list[Registered] = [
        Pair("ptst", "Does leaving the safety prompt out of training protect the test with it?", home, ptst),
        Pair("words", "Are the safety words needed, or is any other text enough?", At(PURE, "placebo"), ptst),
        Pair("context", "Is it safer to leave the training prompt for a neutral text?", home, At(SAFE, "placebo")),
        Pair("paraphrase", "Is it safer to say the training prompt in other words?", home, At(SAFE, "paraphrase")),
        Pair("opposite", "Does the opposite instruction undo PTST?", At(PURE, "opposite"), ptst),
        Slope("distance-safe", "Does the rate fall with the distance from the training prompt?", SAFE),
        Slope("distance-pure", "The same after training without the safety prompt", PURE),
    ]
    for name in (name for name in defenses if name != NONE):
        protected = At(SAFE, "identical", name)
        found.append(Pair(f"{name}-home", f"Does {name} protect under the training prompt itself?", home, protected))
        found.append(Pair(f"{name}-ptst", f"Is PTST safer than {name} under the same prompt?", protected, ptst))
        found.append(Slope(f"{name}-distance", f"Does what is left with {name} depend on distance?", SAFE, name))
    return found
