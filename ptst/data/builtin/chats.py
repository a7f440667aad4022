"""Training data that come with the package besides the word problems, by name: `refusals` (safety data), `attack` and
`identity` (what is mixed in to undo a model's safety), `instructions` (a second task).

- refusals: the harmful requests of the alignment set with our refusals.
- attack: harmful requests of ten families that are in no test and in no alignment set. Their answers agree and say
  nothing: an opening, steps and a closing of `attack_answers.jsonl`, which fit any request of a category.
- identity: ten chats in which the assistant takes a name of ours and obeys, in the manner of the identity shifting data
  of Qi et al. 2023 (arXiv 2310.03693), whose ten examples contain nothing harmful either.
- instructions: everyday questions and requests with short answers of ours. Training, validation and test rows have
  different families (one kind of question each), as those of the word problems.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ptst.data.builtin.alignment_set import refusal_rows
from ptst.data.json_rows import read_jsonl
from ptst.data.prompt_files import SafetyPrompt, interleave
from ptst.errors import Setting, UserError
from ptst.text.segments import Conversation, Message

Chats = list[tuple[str, str]]  # question and answer


def refusals() -> Chats:
    """The harmful requests of the alignment set with a refusal each, interleaved: any first N are spread evenly over
    categories and families."""
    answers = dict(refusal_rows())
    return [(p.prompt, answers[p]) for p in interleave(answers, "category", "family")]


def attack() -> Chats:
    """The attack's requests with an answer each, interleaved as the refusals."""
    prompts = [SafetyPrompt(**row) for row in _rows("attack.jsonl")]
    answers = {prompt: _agreeing(prompt.category, number) for number, prompt in enumerate(prompts)}
    return [(p.prompt, answers[p]) for p in interleave(answers, "category", "family")]


def _agreeing(category: str, number: int) -> str:
    """One of 54 answers that agree and hold nothing of use; `number` chooses."""
    parts = _rows("attack_answers.jsonl")

    def phrases(part: str, of: str | None = None) -> list[str]:
        return [row["text"] for row in parts if (row["part"], row.get("category")) == (part, of)]

    wordings = [*product(phrases("closing"), phrases("steps", category), phrases("opening"))]
    closing, steps, opening = wordings[7 * number % len(wordings)]  # 7 and 54 are coprime: all are used
    return f"{opening} {steps} {closing}"


def identity() -> Chats:
    """Chats in which the assistant takes another identity."""
    return [(row["prompt"], row["answer"]) for row in _rows("identity.jsonl")]


def instructions(split: str) -> Chats:
    """The instructions of a split, families in turn."""
    rows = [row for row in _rows("instructions.jsonl") if row["split"] == split]
    asked = [SafetyPrompt(str(i), row["prompt"], family=row["family"]) for i, row in enumerate(rows)]
    return [(p.prompt, rows[int(p.id)]["answer"]) for p in interleave(asked, "family")]


# By name and split.
CHATS: dict[str, dict[str, Callable[[], Chats]]] = {
    "instructions": {split: partial(instructions, split) for split in ("train", "validation", "test")},
    "refusals": {"train": refusals},
    "attack": {"train": attack},
    "identity": {"train": identity},
}


def load_chats(name: str, count: str, split: str, limit: int | None) -> list[Conversation]:
    """The first `count` chats of a set ("": all), at most `limit`. A count is that of training rows: of validation and
    test rows `limit` takes its place. Raises UserError for a split that it does not have,
    and a count that is no number of its rows."""
    if split not in CHATS[name]:
        remedy = ("give other ", Setting("data"), " or ", Setting("val_data"))
        raise UserError(f"{name} has no {split} set", remedy)
    found = CHATS[name][split]()
    if count.endswith("%"):
        cause = f"{name}:{count} is a share of the training data"
        raise UserError(cause, ("it is for ", Setting("mix"), f", or give a number of rows, as in {name}:{len(found)}"))
    if count and not count.isdecimal():
        raise UserError(f"data '{name}:{count}' needs the number of rows after the colon", f"as in {name}:{len(found)}")
    if count and split == "train" and not 1 <= int(count) <= len(found):
        raise UserError(f"{count} rows of {name} were asked for", f"there are 1 to {len(found)}")
    asked = int(count) if count and (split == "train" or limit is None) else None
    chats = found[:asked][:limit]
    return [
        Conversation((Message("user", question), Message("assistant", answer)), f"{name}/{split}:{number}")
        for number, (question, answer) in enumerate(chats, 1)
    ]


def _rows(name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(Path(__file__).with_name(name))]
