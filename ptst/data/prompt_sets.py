"""Sets of prompts by name: AdvBench, DirectHarm4, GSM-Danger, JailbreakBench, XSTest, the built-in ones, or a file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptst.data.builtin.safety_sets import COUNT, SUBSTITUTE, harmful_requests, look_alikes, substitute
from ptst.data.files import HubDataset, check_limit, read_hub
from ptst.data.prompt_files import SafetyPrompt, interleave, read_prompts, to_prompts
from ptst.errors import UserError, unknown_name

BUILT_IN, LOOK_ALIKES = "built-in", "look-alikes"
OWN: dict[str, Callable[[], list[SafetyPrompt]]]
OWN = {BUILT_IN: harmful_requests, LOOK_ALIKES: look_alikes, SUBSTITUTE: substitute}
NAMED = {
    "advbench": HubDataset("walledai/AdvBench", None, "train"),  # Zou et al. 2023, arXiv 2307.15043: 520 goals
    "directharm4": HubDataset("vfleaking/DirectHarm4", None, "test"),  # Lyu et al. 2024: 400, 100 of each category
    "gsm-danger": HubDataset("vfleaking/GSM-Danger", None, "test"),  # Lyu et al. 2024: 100
    "jailbreakbench": HubDataset("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),  # Chao et al. 2024: 100
    "xstest": HubDataset("walledai/XSTest", None, "test"),  # Roettger et al. 2024, arXiv 2308.01263: 250 + 200 unsafe
}
SETS = (BUILT_IN, LOOK_ALIKES, *NAMED, SUBSTITUTE)


@dataclass(frozen=True)
class PromptSet:
    """Prompts under the name that reports give them; `note` is what the user must know about them."""

    name: str
    prompts: tuple[SafetyPrompt, ...]
    note: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over all prompts in order."""
        lines = (json.dumps([prompt.prompt, prompt.request]) + "\n" for prompt in self.prompts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_set(data: str, limit: int | None = None) -> PromptSet:
    """The prompts of FILE, NAME or NAME:FILE, at most `limit`, spread over their categories. A name is looked up as a
    path first, then on the hub. Raises UserError for a name or file that does not exist, and as `read_prompts`."""
    check_limit(limit, "prompt")
    name, _, file = data.partition(":")
    note = ""
    if Path(data).is_file() or (name not in SETS and Path(data).suffix):
        name, prompts = Path(data).stem, read_prompts(data)
    elif name not in SETS:
        raise UserError(unknown_name("prompt set", name, SETS).cause, "or give a CSV, JSONL, JSON or TXT file")
    elif file and name in OWN:
        raise UserError(f"prompts {data!r}: {name} is built in and takes no file")
    elif name in OWN:
        prompts = OWN[name]()
    elif file:
        prompts = read_prompts(file)
    else:
        try:
            remedy = f"give its file, as in {name}:FILE, or use the {BUILT_IN} prompts"
            prompts = to_prompts(read_hub(name, NAMED[name], remedy), name)
        except UserError as error:
            if name != "gsm-danger":
                raise
            name, prompts = SUBSTITUTE, substitute()
            note = f"{error}. Instead: {SUBSTITUTE}, {COUNT} prompts of our own, not comparable with GSM-Danger's"
    if limit is not None and limit < len(prompts):
        prompts = interleave(prompts, "category")[:limit]  # files are often sorted
    return PromptSet(name, tuple(prompts), note)
