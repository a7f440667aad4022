"""What the audit can find: every rule by name, with its level, what it means and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ptst.errors import UserError, unknown_name

LEVELS = ("info", "warning", "error")
VERDICTS = {"error": "errors found", "warning": "warnings found", "info": "clean"}


@dataclass(frozen=True)
class Rule:
    level: str
    meaning: str
    remedy: str


RULES = {
    # Of a batch: the packed sequence that the loss function gets.
    "boundaries": Rule(
        "error",
        "document boundaries (cu_seqlens) are not those of the examples, so attention crosses documents",
        "build batches with ptst.data.packing only",
    ),
    "position-ids": Rule(
        "error", "a position is not the token's index in its document", "start positions at 0 in every document"
    ),
    "labels": Rule("error", "the label of a trained token is not the token after it", "shift labels by one, once"),
    # Of a document: one row's tokens and labels.
    "nothing-trained": Rule("error", "no token of the row is trained", "raise the length limit or check the loss mask"),
    "prompt-trained": Rule(
        "error", "a token that the model never has to sample is trained", "train answers and terminators only"
    ),
    "answer-untrained": Rule(
        "error",
        "a token of an answer is not trained",
        "derive the loss mask from segments, not by searching the ids",
    ),
    "terminator-untrained": Rule(
        "error",
        "the token that ends an answer is not trained, so the model never learns to stop",
        "train the terminator, also if it is used for padding elsewhere",
    ),
    "terminator-missing": Rule("error", "an answer has no terminator", "close every answer as the format does"),
    "terminator-extra": Rule(
        "error", "there is a terminator where the format has none", "close every answer once, as the format does"
    ),
    "double-bos": Rule("error", "two BOS tokens in a row", "let the template or the tokenizer add BOS, not both"),
    "missing-bos": Rule("error", "BOS is missing where the format's owner puts it", "put BOS as the format does"),
    "extra-bos": Rule("error", "there is a BOS where the format's owner puts none", "put BOS as the format does"),
    "forged-control": Rule(
        "error",
        "text of a message became a control token",
        "encode messages as text, so that no message can open or close a turn",
    ),
    "control-tokens": Rule(
        "error", "control tokens are not those of the format, in its order", "write roles as the format's owner does"
    ),
    "text-differs": Rule(
        "error", "the ids decode to another text than template, format and row give", "encode the row's text unchanged"
    ),
    "unnatural-ids": Rule(
        "error",
        "text was encoded in pieces, so its ids are not those of one call of the tokenizer",
        "encode each run of text between control tokens in one call",
    ),
    "prompt-differs": Rule(
        "error",
        "the prompt at test time is not a prefix of the training sequence",
        "encode prompts for training and testing by the same code",
    ),
    "cut-short": Rule(
        "error", "the row ends early, although it should not be cut", "drop long rows, or choose too_long cut"
    ),
    "too-long": Rule("error", "the row is longer than the limit", "drop or cut it before packing"),
    "token-boundary": Rule(
        "info",
        "the answer was encoded as a continuation, because together with the prompt it would change the prompt's ids",
        "nothing; the same happens at test time",
    ),
    "lossy-text": Rule(
        "warning",
        "the tokenizer cannot represent the text",
        "replace the character, or accept that the model reads another",
    ),
    # Of the data.
    "role-markers": Rule(
        "error",
        "a message holds the chat format's role markers as text, so it could open or close a turn",
        "remove them from the message",
    ),
    "bad-row": Rule("error", "the row cannot be trained on", "correct or remove the row"),
    "blank-answer": Rule("warning", "an answer is empty or blank", "remove the row, or give it an answer"),
    "blank-prompt": Rule("warning", "a user's turn is empty or blank", "remove the row, or give it a question"),
    "cut": Rule("info", "rows were cut to the limit; a cut answer has no terminator", "raise the length limit"),
    "dropped": Rule("info", "rows longer than the limit were left out", "raise the length limit, or cut the rows"),
    "untrained": Rule("warning", "rows without a trained token were left out", "raise the length limit"),
    "duplicate": Rule("info", "rows repeat earlier ones", "remove them unless they should count twice"),
    "overlap": Rule("warning", "training rows are also asked at test time", "remove them from one of the two"),
    # Against other references.
    "chat-template": Rule(
        "warning",
        "the model's own chat template renders conversations differently",
        "choose the chat format that fits the model",
    ),
    "known-difference": Rule(
        "info", "a known difference from the format's owner applies", "nothing; docs/templates.md says why"
    ),
    "other-prompt": Rule("info", "training and test templates differ, as intended", "nothing, if that is intended"),
    "run-drift": Rule(
        "error",
        "the run's data would be encoded differently today",
        "train again, or use the version and files of the run",
    ),
}
# Earlier names; the command line still accepts them after --allow, with a note.
OLD_RULES = {
    "role-marks": "role-markers",
    "own-template": "chat-template",
    "departure": "known-difference",
    "seam": "token-boundary",
    "targets": "labels",
    "positions": "position-ids",
}


@dataclass(frozen=True)
class Finding:
    """One thing found. `row`: the row of the data (`file:line`). `token`: an index into that row's tokens."""

    rule: str
    row: str
    cause: str
    token: int | None = None
    allowed: bool = False

    @property
    def level(self) -> str:
        return "info" if self.allowed else RULES[self.rule].level

    @property
    def place(self) -> str:
        """Row and token."""
        return self.row + (f", token {self.token}" if self.token is not None else "")

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{self.level} {self.rule}: {place}{self.cause}; {RULES[self.rule].remedy}"


def check_names(rules: Iterable[str]) -> None:
    """Raise UserError for an unknown rule to allow."""
    for name in rules:
        if name in OLD_RULES:
            raise UserError(f"rule {name!r} was renamed", f"it is {OLD_RULES[name]} now")
        if name not in RULES:
            raise unknown_name("audit rule", name, RULES)


def worst(findings: Iterable[Finding]) -> str:
    """The highest level among findings; info if there are none."""
    return max((f.level for f in findings), key=LEVELS.index, default="info")


def by_rule(findings: Iterable[Finding]) -> dict[str, int]:
    """Number of findings of each rule, in order of appearance."""
    return dict(Counter(f.rule for f in findings))
