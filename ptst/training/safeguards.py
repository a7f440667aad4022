"""Safeguards of training: what keeps a model near its aligned self while it is fine-tuned. All are off by default, and
a run without them computes what it would compute if they did not exist.

average             the weights that are kept are a running average of those of all steps (ptst/training/average.py)
token_constraint    the first tokens of an answer are held near those of a reference model: constrained SFT of Qi et al.
                    2025, "Safety alignment should be made more than just a few tokens deep", arXiv 2406.05946, equation
                    3 (ptst/training/constraint.py)
proximal, phases    Lisa of Huang et al. 2024, arXiv 2405.18641: steps on safety data and on the main data take turns,
                    and each turn is pulled back to the weights at its beginning (ptst/training/proximal.py,
                    ptst/data/order.py)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ptst.data.mix_part import parse_mix
from ptst.errors import Setting, UserError
from ptst.settings import check_at_least, check_share, content


@dataclass(frozen=True, kw_only=True)
class ProximalSettings:
    """How steps take turns, and what pulls them back."""

    proximal: float = 0.0
    """Strength rho of a pull to the weights at the beginning of the turn (see --phases), or of training where there are
    no turns: the loss gets rho / 2 times their squared distance."""
    phases: tuple[int, ...] = ()
    """Steps on the data of --mix, and on the main data, in turn, as in 1 3. Default: both in the same steps."""

    def check_turns(self) -> None:
        """Raise UserError for a value that makes no sense."""
        check_at_least(self, 0, "proximal")
        check_phases(self.phases)


@dataclass(frozen=True, kw_only=True)
class SafeguardSettings(ProximalSettings):
    """What keeps a model near its aligned self."""

    average: float = 0.0
    """Decay of a running average of the weights, which is evaluated and kept; 0: the weights themselves."""
    token_constraint: tuple[float, ...] = ()
    """Strengths beta of the constraint that holds an answer's tokens near a reference model's: of the first, of the
    second to fifth, and of the rest; 0.5 2 0.1 in the paper (Qi et al. 2025). Default: none."""
    reference: str | None = field(default=None, metadata=content("reference"))
    """Reference model of --token-constraint, with the same tokenizer. Default: the model that is trained."""

    def check_safeguards(self) -> None:
        """Raise UserError for a value that makes no sense."""
        self.check_turns()
        check_share(self, "average")
        if self.token_constraint:
            check_betas(self.token_constraint, "token_constraint")
        if self.reference is not None and not self.token_constraint:
            cause = (Setting("reference"), " has no effect without ", Setting("token_constraint"))
            raise UserError(cause, "give both, or neither")


def check_betas(betas: Sequence[float], setting: str) -> None:
    """Raise UserError for strengths of the token constraint that make no sense; `setting`: which has them."""
    if len(betas) != 3 or not all(0 < beta < math.inf for beta in betas):
        remedy = "it is three numbers above 0: of the first token of an answer, of tokens 2 to 5, of the rest"
        raise UserError((Setting(setting), f" is {tuple(betas)}"), remedy)


def check_phases(phases: Sequence[int], mix: Sequence[str] | None = None) -> None:
    """Raise UserError for phases that make no sense, or for which nothing is mixed in. `mix`: None where it is not
    known."""
    if not phases:
        return
    check_turn_lengths(phases)
    if mix is not None and not mix:
        cause = (Setting("phases"), " takes turns with other data, and none are mixed in")
        raise UserError(cause, ("name them as ", Setting("mix")))
    if any(parse_mix(text).share for text in mix or ()):
        remedy = "give that data as rows of the main file"
        what = (Setting("phases"), " takes turns with data of their own, and a share in ", Setting("mix"))
        raise UserError((*what, " replaces rows of the main data"), remedy)


def check_turn_lengths(phases: Sequence[int]) -> None:
    """Raise UserError unless these are two numbers of steps."""
    if len(phases) != 2 or min(phases) < 1:
        remedy = "it is two numbers of steps, each at least 1: on the data mixed in, and on the main data"
        raise UserError((Setting("phases"), f" is {tuple(phases)}"), remedy)
