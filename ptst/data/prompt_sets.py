"""Sets of prompts by name: AdvBench, DirectHarm4, GSM-Danger, JailbreakBench, XSTest, the built-in ones, or a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ptst.data.builtin.gsm_danger import COUNT, SUBSTITUTE, substitute
from ptst.data.files import Hub, read_hub
from ptst.data.safety_sets import SafetyPrompt, collect, harmful_requests, look_alikes, read_prompts, spread
from ptst.errors import UserError, unknown_name

BUILT_IN, LOOK_ALIKES = "built-in", "look-alikes"
NAMED = {
    "advbench": Hub("walledai/AdvBench", None, "train"),  # Zou et al. 2023, arXiv 2307.15043: 520 goals
    "directharm4": Hub("vfleaking/DirectHarm4", None, "test"),  # Lyu et al. 2024: 400, 100 of each category
    "gsm-danger": Hub("vfleaking/GSM-Danger", None, "test"),  # Lyu et al. 2024: 100
    "jailbreakbench": Hub("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),  # Chao et al. 2024: 100
    "xstest": Hub("walledai/XSTest", None, "test"),  # Roettger et al. 2024, arXiv 2308.01263: 250 safe, 200 unsafe
}
SETS = (BUILT_IN, LOOK_ALIKES, *NAMED, SUBSTITUTE)


@dataclass(frozen=True)
class PromptSet:
    """Prompts under the name that reports give them; `note` is what the user must be told about them."""

    name: str
    prompts: tuple[SafetyPrompt, ...]
    note: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over all prompts in order."""
        digest = hashlib.sha256()
        for p in self.prompts:
            digest.update(json.dumps([p.prompt, p.request]).encode() + b"\n")
        return digest.hexdigest()


def load_set(data: str, limit: int | None = None) -> PromptSet:
    """The prompts of FILE, NAME or NAME:FILE, at most `limit`, spread over their categories. A name is looked for as a
    path first, then on the hub.

    Raises UserError for a name or file that is not there, and as `read_prompts`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; at least 1 prompt is needed (leave the limit out for all)")
    name, _, file = data.partition(":")
    note = ""
    if Path(data).is_file() or (name not in SETS and Path(data).suffix):
        name, prompts = Path(data).stem, read_prompts(data)
    elif name not in SETS:
        raise UserError(unknown_name("prompt set", name, SETS).cause, "or give a CSV, JSONL, JSON or TXT file")
    elif file and name in NAMED:
        prompts = read_prompts(file)
    elif file:
        raise UserError(f"prompts {data!r}: {name} is built in and takes no file")
    elif name == BUILT_IN:
        prompts = harmful_requests()
    elif name == LOOK_ALIKES:
        prompts = look_alikes()
    elif name == SUBSTITUTE:
        prompts = substitute()
    else:
        try:
            instead = f"give its file, as in {name}:FILE, or use the {BUILT_IN} prompts"
            rows = read_hub(name, NAMED[name], instead)
        except ValueError as error:
            if name != "gsm-danger":
                raise
            name, prompts = SUBSTITUTE, substitute()
            note = f"{error}. In its place: {SUBSTITUTE}, {COUNT} prompts of our own, not comparable with GSM-Danger's"
        else:
            prompts = collect(((i, row) for i, (_, row) in enumerate(rows, 1)), f"{name} on the hub", name)
    return PromptSet(name, tuple(spread(prompts, limit)), note)
