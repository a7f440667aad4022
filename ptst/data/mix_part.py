"""How one source of mixed-in data is named: `FILE:EPOCHS`, or `FILE:EPOCHS:TEMPLATE` under a template of its own.
With a share of the training data, `FILE:5%`, its rows take the place of so many of those, for as many epochs; or for
its own, `FILE:5%:EPOCHS`.

Names of data and of templates may hold colons (`word-problems:800:0.5`, `safety.jsonl:1:chat:llama`), so the epochs or
the share are the last part between colons that is a number or a percentage.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.text.templates import Template, find_template, load_template

TOML = ".toml"


@dataclass(frozen=True)
class MixPart:
    """A source that is mixed in. `template`: the name or TOML file of its own template; None: that of the run. `share`:
    per cent of the main data's rows that it replaces; `epochs` 0: it has the epochs of these."""

    name: str
    epochs: float
    template: str | None = None
    share: float = 0.0

    def find_template(self) -> tuple[Template | None, Path | None]:
        """Its own template, with the TOML file that has it, if any; (None, None) without one. Raises UserError as
        `templates.find_template` and `load_template`."""
        if self.template is None:
            return None, None
        if not self.template.endswith(TOML):
            return find_template(self.template), None
        return load_template(self.template, "mix"), Path(self.template)


def split_mix(text: str) -> tuple[str, str, str | None] | None:
    """(data, epochs or share, template) as they are written; None where no part is a number."""
    parts = text.split(":")
    at = next((i for i in range(len(parts) - 1, 0, -1) if _number(parts[i].removesuffix("%")) is not None), None)
    if at is None:
        return None
    return ":".join(parts[:at]), parts[at], ":".join(parts[at + 1 :]) if parts[at + 1 :] else None


def parse_mix(text: str) -> MixPart:
    """`FILE:EPOCHS`, `FILE:SHARE` or `FILE:SHARE:EPOCHS`, each also with `:TEMPLATE`. Raises UserError for
    anything else, and for an unknown name of a template; a TOML file is not read."""
    name, number, template = split_mix(text) or ("", "", None)
    share = 0.0
    if number.endswith("%"):
        share, number = _share(number, text), ""
    elif (found := split_mix(name)) and name.endswith("%"):
        name, share = found[0], _share(found[1], text)
    epochs = 0.0 if share and not number else _number(number)
    if not name or epochs is None or not (epochs if number else share) or not 0 <= epochs < math.inf or template == "":
        remedy = "write the data, a colon and its epochs, as in safety.jsonl:1, or also its template: data:1:chat:llama"
        raise UserError((Setting("mix"), f" is {text!r}"), remedy)
    if template is not None and not template.endswith(TOML):
        try:
            find_template(template)
        except UserError as error:
            raise UserError((Setting("mix"), f" {text}: ", *error.parts)) from None
    return MixPart(name, epochs, template, share)


def _share(text: str, whole: str) -> float:
    share = _number(text.removesuffix("%"))
    if share is None or not 0 < share < 100:
        cause = (Setting("mix"), f" is {whole!r}, and {text} of the training data cannot be replaced")
        raise UserError(cause, "give a share above 0% and below 100%, or leave it out")
    return share


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
