"""How one source of mixed-in data is named: `FILE:EPOCHS`, or `FILE:EPOCHS:TEMPLATE` under a template of its own.

Names of data and of templates may hold colons (`word-problems:800:0.5`, `safety.jsonl:1:chat:llama`), so the epochs are
the last part between colons that is a number.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.text.templates import Template, find_template, load_template

TOML = ".toml"


@dataclass(frozen=True)
class MixPart:
    """A source that is mixed in. `template`: the name or TOML file of its own template; None: that of the run."""

    name: str
    epochs: float
    template: str | None = None

    def find_template(self) -> tuple[Template | None, Path | None]:
        """Its own template, with the TOML file that has it, if any; (None, None) without one. Raises UserError as
        `templates.find_template` and `load_template`."""
        if self.template is None:
            return None, None
        if not self.template.endswith(TOML):
            return find_template(self.template), None
        return load_template(self.template, "mix"), Path(self.template)


def split_mix(text: str) -> tuple[str, str, str | None] | None:
    """(data, epochs, template) as they are written; None where no part is a number."""
    parts = text.split(":")
    at = next((i for i in range(len(parts) - 1, 0, -1) if _number(parts[i]) is not None), None)
    if at is None:
        return None
    return ":".join(parts[:at]), parts[at], ":".join(parts[at + 1 :]) if parts[at + 1 :] else None


def parse_mix(text: str) -> MixPart:
    """`FILE:EPOCHS` or `FILE:EPOCHS:TEMPLATE`. Raises UserError for anything else, and for an unknown name of a
    template; a TOML file is not read."""
    name, number, template = split_mix(text) or ("", "", None)
    epochs = _number(number)
    if not name or epochs is None or not 0 < epochs < math.inf or template == "":
        remedy = "write the data, a colon and its epochs, as in safety.jsonl:1, or also its template: data:1:chat:llama"
        raise UserError((Setting("mix"), f" is {text!r}"), remedy)
    if template is not None and not template.endswith(TOML):
        try:
            find_template(template)
        except UserError as error:
            raise UserError((Setting("mix"), f" {text}: ", *error.parts)) from None
    return MixPart(name, epochs, template)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
