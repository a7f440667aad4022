"""The settings of mixed-in data as the audit itself reads them: data, epochs or share, template.

Shares nothing with `ptst.data.mix_part`: here one pattern says what belongs to what.
"""

import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# The first part is greedy, so that of several numbers the last is the epochs.
_MIX = re.compile(rf"(?s)(?P<data>.+):(?P<epochs>\s*{_NUMBER}\s*)(?P<percent>%)?(?::(?P<template>.+))?")
_SHARE = re.compile(rf"(?s)(?P<data>.+):\s*(?P<share>{_NUMBER})\s*%")


class AskedMix(NamedTuple):
    """`share`: of the main data's rows, in per cent, whose place its rows take; `epochs` None: for as many epochs as
    these. `template`: a name or
    a file as it was written, None without one."""

    data: str
    epochs: float | None
    template: str | None = None
    share: Decimal | None = None

    @property
    def file(self) -> Path | None:
        return Path(self.template) if self.template is not None and self.template.endswith(".toml") else None

    @property
    def full_name(self) -> str | None:
        """The template's name, for a file the one in it."""
        if self.file is not None:
            return str(tomllib.loads(self.file.read_text("utf-8")).get("name"))
        if self.template is None:
            return None
        return self.template if ":" in self.template else f"chat:{self.template}"


def asked_mix(text: str) -> AskedMix:
    """One setting of `mix`, which training has accepted."""
    found = _MIX.fullmatch(text)
    assert found is not None, f"{text!r} is not FILE:EPOCHS or FILE:EPOCHS:TEMPLATE"
    if not found["percent"] and (shared := _SHARE.fullmatch(found["data"])):
        return AskedMix(shared["data"], float(found["epochs"]), found["template"], Decimal(shared["share"]))
    if found["percent"]:
        return AskedMix(found["data"], None, found["template"], Decimal(found["epochs"].strip()))
    return AskedMix(found["data"], float(found["epochs"]), found["template"])
