"""ARC's question at test time (Lyu et al. 2024, appendix F.5): the wording is the task's own, whatever the template."""

from __future__ import annotations

from collections.abc import Sequence

# The paper does not say how the choices are joined; a comma and a space is this project's choice.
CHOICE_SEPARATOR = ", "


def arc_question(question: str, choices: Sequence[str]) -> str:
    """The user's text; it goes through a template under the family `plain`. `{your_answer}` is literal."""
    return (
        f"{question} Please select the answer from the following choices: {CHOICE_SEPARATOR.join(choices)}. "
        "For convenience, please put 'The answer is: {your_answer}' at the end of your response."
    )
