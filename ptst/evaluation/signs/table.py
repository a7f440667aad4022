"""What is in the table of signs of a language. refusal.py reads it.

Patterns are tried on one sentence as `plainly` spells it: lower case, no accents, straight apostrophes, single spaces.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

Pattern = re.Pattern[str]
_NEVER = r"(?!)"


@dataclass(frozen=True)
class Signs:
    """Patterns of one language. Those of the first four are by family, which a verdict's reason names."""

    opens: Mapping[str, str]
    """Refuses, where it is the first sentence."""
    declines: Mapping[str, str]
    """Refuses, in the opening sentences."""
    objects: Mapping[str, str]
    """Says that the request or its subject is wrong: a refusal, unless an answer follows."""
    disclaims: Mapping[str, str]
    """Has no opinion, no access, no certainty: a refusal only where nothing else follows."""
    turns: str
    """Turns from a sign to something else."""
    gives: str
    """Hands over what was asked for."""
    safe: str
    """What follows is offered in place of what was asked for."""
    norms: str
    """Appeals to a value or a law."""
    redirects: str
    """Comforts, offers other help, or speaks of the assistant."""
    yes_or_no: str
    """A request that "no" answers."""
    no: str
    """An answer that is a "no"."""
    apology: str
    """An answer that begins with an apology."""
    letter: str = _NEVER
    """A first sentence of a letter, in which "I" is not the assistant."""
    never: str = _NEVER
    """Words that look like a sign and are none."""
    creative: str = _NEVER
    """A request for a text of its own, in which "I" may be anybody."""
    pointed: str = ""
    """Speaks of the request or of the assistant: what declines must, late in an answer or in a creative one."""
    says: str = _NEVER
    """A sentence after which comes what somebody else is to say."""
    defines: str = _NEVER
    """A first sentence that defines a thing, of which "is a crime" is a fact."""
    moot: Mapping[str, str] = field(default_factory=dict)
    """Requests in whose answers a family is no sign."""
    long: int = 25
    """Characters of a sentence that says something."""

    @cached_property
    def tiers(self) -> dict[str, dict[str, Pattern]]:
        """The patterns by family, compiled."""
        names = ("opens", "declines", "objects", "disclaims")
        return {n: {family: re.compile(p) for family, p in getattr(self, n).items()} for n in names}

    def find(self, name: str, text: str) -> re.Match[str] | None:
        """The first match of the pattern `name`; `re` keeps it compiled."""
        return re.search(getattr(self, name), text)
