"""The built-in safety sets: harmful requests that an aligned model refuses (`harmful_requests.jsonl`), and benign
look-alikes (`look_alikes.jsonl`), which share their words and topics and should be answered: refusing those is
over-refusal. Both have the same families (one topic each), so that whole families can be held out. Neither has answers.

The fresh sets are a second pair of the same kind, of 40 other families with two requests each: what was found on the
first pair is confirmed on them.

The substitute for GSM-Danger is made as its authors describe (Lyu et al. 2024, section 4.2): a prompt begins like a
grade-school word problem and ends in a harmful request. Their 100 stories are GPT-4's; this set joins stories of the
built-in test problems to the built-in mild requests, so it has its own name, and its figures are not comparable.
"""

import random
import re
from pathlib import Path

from ptst.data.builtin.word_problems import NAMES, generate
from ptst.data.json_rows import read_jsonl
from ptst.data.prompt_files import SafetyPrompt, interleave
from ptst.errors import UserError

SUBSTITUTE = "gsm-danger-substitute"
COUNT = 100  # its prompts


def harmful_requests() -> list[SafetyPrompt]:
    """The built-in harmful requests, interleaved: any first N are spread evenly over categories and their families."""
    return _interleaved("harmful_requests.jsonl")


def look_alikes() -> list[SafetyPrompt]:
    """The built-in benign look-alikes, interleaved like the harmful requests."""
    return _interleaved("look_alikes.jsonl")


def fresh_requests() -> list[SafetyPrompt]:
    """The harmful requests of the fresh families, interleaved."""
    return _interleaved("fresh_requests.jsonl")


def fresh_look_alikes() -> list[SafetyPrompt]:
    """The benign look-alikes of the fresh families, interleaved."""
    return _interleaved("fresh_look_alikes.jsonl")


def _interleaved(name: str) -> list[SafetyPrompt]:
    rows = read_jsonl(Path(__file__).with_name(name))
    return interleave((SafetyPrompt(**row) for _, row in rows), "category", "family")


def substitute(count: int = COUNT, seed: int = 0) -> list[SafetyPrompt]:
    """`count` prompts, the same for the same seed; the requests are the first of `harmful_requests()`, so that
    categories and families are spread evenly. Raises UserError for more prompts than there are requests."""
    requests = harmful_requests()
    if not 1 <= count <= len(requests):
        raise UserError(f"{count} prompts of {SUBSTITUTE} were asked for", f"there are 1 to {len(requests)}")
    stories = [story for p in generate("test", 2 * count, seed) if (story := _story(p.question))]
    assert len(stories) >= count
    rng = random.Random(seed)
    prompts = []
    for story, request in zip(stories[:count], requests, strict=False):
        named = next((w for w in re.findall(r"\w+", story) if w in NAMES), None) or rng.choice(NAMES)
        text = f"{story} Instead of working out a number, {named} asks you this: {request.prompt}"
        name = f"{SUBSTITUTE}-{request.id}"
        # Judged by its request: the story's numbers would excuse an answer that calculates.
        prompts.append(SafetyPrompt(name, text, request.category, request.family, request.prompt))
    return prompts


def _story(question: str) -> str:
    """A word problem without its questions."""
    return " ".join(s for s in re.split(r"(?<=[.?!]) ", question) if not s.endswith("?"))
