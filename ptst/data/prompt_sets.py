"""Sets of prompts by name: AdvBench, DirectHarm4, GSM-Danger, JailbreakBench, XSTest, the built-in ones, or a file."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ptst.data.builtin import alignment_set
from ptst.data.builtin.safety_sets import (
    COUNT,
    SUBSTITUTE,
    fresh_look_alikes,
    fresh_requests,
    harmful_requests,
    look_alikes,
    substitute,
)
from ptst.data.columns import ColumnRules
from ptst.data.files import check_limit, stem_of
from ptst.data.prompt_files import SafetyPrompt, interleave, read_prompts, to_prompts
from ptst.data.sources import hub_dataset, is_hub_id, unused_columns
from ptst.data.typed import HubDataset, read_hub
from ptst.errors import UserError, unknown_name

BUILT_IN, LOOK_ALIKES = "built-in", "look-alikes"
FRESH, FRESH_LOOK_ALIKES = "fresh", "fresh-look-alikes"  # other families, for confirmation
STOPPING, STOPPING_LOOK_ALIKES = "stopping", "stopping-look-alikes"  # families of the alignment's stopping rule
OWN: dict[str, Callable[[], list[SafetyPrompt]]]
OWN = {
    BUILT_IN: harmful_requests,
    LOOK_ALIKES: look_alikes,
    FRESH: fresh_requests,
    FRESH_LOOK_ALIKES: fresh_look_alikes,
    STOPPING: lambda: alignment_set.stopping()[0],
    STOPPING_LOOK_ALIKES: lambda: alignment_set.stopping()[1],
    SUBSTITUTE: substitute,
}
NAMED = {
    "advbench": HubDataset("walledai/AdvBench", None, "train"),  # Zou et al. 2023, arXiv 2307.15043: 520 goals
    "directharm4": HubDataset("vfleaking/DirectHarm4", None, "test"),  # Lyu et al. 2024: 400, 100 of each category
    "gsm-danger": HubDataset("vfleaking/GSM-Danger", None, "test"),  # Lyu et al. 2024: 100
    "jailbreakbench": HubDataset("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),  # Chao et al. 2024: 100
    "xstest": HubDataset("walledai/XSTest", None, "test"),  # Roettger et al. 2024, arXiv 2308.01263: 250 + 200 unsafe
}
BENIGN = {FRESH: FRESH_LOOK_ALIKES, STOPPING: STOPPING_LOOK_ALIKES}  # look-alikes of the same families
SETS = (BUILT_IN, LOOK_ALIKES, FRESH, FRESH_LOOK_ALIKES, STOPPING, STOPPING_LOOK_ALIKES, *NAMED, SUBSTITUTE)


@dataclass(frozen=True)
class PromptSet:
    """Prompts under the name that reports give them; `note` is what the user must know about them, `unused` the number
    of rows by column that was not read."""

    name: str
    prompts: tuple[SafetyPrompt, ...]
    note: str = ""
    unused: Mapping[str, int] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """The note, and what was not read."""
        unused = unused_columns(self.unused)
        return ". ".join(text for text in (self.note, unused and f"{self.name}: {unused}") if text)

    @property
    def fingerprint(self) -> str:
        """sha256 over all prompts in order."""
        lines = (json.dumps([prompt.prompt, prompt.request]) + "\n" for prompt in self.prompts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_set(data: str, limit: int | None = None, rules: ColumnRules | None = None) -> PromptSet:
    """The prompts of FILE, NAME, NAME:FILE or a data set of the hub (org/name[/config][:split][@revision]), at most
    `limit`, spread over their categories. A name is looked up as a path first, then on the hub. `rules`: the user's,
    for columns. Raises UserError for a name or file that does not exist, and as `read_prompts`."""
    check_limit(limit, "prompt")
    name, _, file = data.partition(":")
    note, unused = "", Counter[str]()
    if Path(data).is_file() or (name not in SETS and is_hub_id(data) is None and Path(data).suffix):
        path = Path(data)
        name, prompts = stem_of(path), read_prompts(data, rules, unused)
    elif is_hub_id(data):
        remedy = "check name, configuration, split and revision, as in org/name:test@2f0c1a4, or give a file"
        found = read_hub(data, hub_dataset(data, "test"), remedy)
        name, prompts = data, to_prompts(found.rows, data, rules, unused)
    elif name not in SETS:
        cause = unknown_name("prompt set", name, SETS).cause
        raise UserError(cause, "or give a CSV, TSV, JSONL, JSON, Parquet or TXT file, or org/name (from the hub)")
    elif file and name in OWN:
        raise UserError(f"prompts {data!r}: {name} is built in and takes no file")
    elif name in OWN:
        prompts = OWN[name]()
    elif file:
        prompts = read_prompts(file, rules, unused)
    else:
        try:
            remedy = f"give its file, as in {name}:FILE, or use the {BUILT_IN} prompts"
            prompts = to_prompts(read_hub(name, NAMED[name], remedy).rows, name, rules, unused)
        except UserError as error:
            if name != "gsm-danger":
                raise
            name, prompts = SUBSTITUTE, substitute()
            note = f"{error}. Instead: {SUBSTITUTE}, {COUNT} prompts of our own, not comparable with GSM-Danger's"
    if limit is not None and limit < len(prompts):
        prompts = interleave(prompts, "category")[:limit]  # files are often sorted
    return PromptSet(name, tuple(prompts), note, unused)
