"""What the audit can find: every rule by name, with its level, what it means and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ptst.errors import UserError

LEVELS = ("info", "warning", "error")


@dataclass(frozen=True)
class Rule:
    level: str
    meaning: str
    remedy: str


RULES = {
    # Of a batch: the flat row that the loss function gets.
    "boundaries": Rule(
        "error",
        "documents are not parted as the examples are, so attention sees across them",
        "build batches with ptst.data.packing alone",
    ),
    "positions": Rule(
        "error", "a position is not the token's place in its document", "let positions start at 0 in every document"
    ),
    "targets": Rule("error", "a trained token's target is not the token after it", "shift targets by one exactly once"),
    # Of a document: one row's tokens and targets.
    "nothing-trained": Rule("error", "no token of the row is trained", "raise --max-length or look at the mask"),
    "prompt-trained": Rule(
        "error", "a token that the model never has to sample is trained", "train answers and terminators only"
    ),
    "answer-untrained": Rule(
        "error", "a token of an answer is not trained", "let the mask follow the segments, not a search in the ids"
    ),
    "terminator-untrained": Rule(
        "error",
        "the token that ends an answer is not trained, so the model never learns to stop",
        "train the terminator, also where it serves as padding elsewhere",
    ),
    "terminator-missing": Rule("error", "an answer has no terminator", "close every answer as the format does"),
    "terminator-extra": Rule(
        "error", "a terminator stands where the format puts none", "close every answer once, as the format does"
    ),
    "double-bos": Rule(
        "error", "two BOS tokens stand in a row", "let either the template or the tokenizer put BOS, not both"
    ),
    "missing-bos": Rule("error", "BOS does not stand where the format's owner puts it", "put BOS as the format does"),
    "extra-bos": Rule("error", "BOS stands where the format's owner puts none", "put BOS as the format does"),
    "forged-control": Rule(
        "error",
        "text of a message became a control token",
        "encode messages as text, so that no message can open or close a turn",
    ),
    "control-tokens": Rule(
        "error", "control tokens are not those of the format, in its order", "spell roles as the format's owner does"
    ),
    "text-differs": Rule(
        "error", "the ids do not spell what the template, format and row say", "encode the row's own text, unchanged"
    ),
    "unnatural-ids": Rule(
        "error",
        "text was encoded in pieces, so its ids are not those of one call of the tokenizer",
        "encode each run of text between control tokens in one call",
    ),
    "prompt-differs": Rule(
        "error",
        "the prompt at test time is not the beginning of the training sequence",
        "encode prompts for training and testing by one path",
    ),
    "cut-short": Rule(
        "error",
        "the row stops before its end, though it was not to be cut",
        "drop long rows, or ask for --too-long cut",
    ),
    "too-long": Rule("error", "the row is longer than the limit", "drop or cut it before it is packed"),
    "token-boundary": Rule(
        "info",
        "the answer was encoded as a continuation, because together with the prompt it would change the prompt's ids",
        "nothing; it is so at test time, too",
    ),
    "lossy-text": Rule(
        "warning",
        "the tokenizer cannot give the text back",
        "mend the character, or accept that the model reads another",
    ),
    # Of the data.
    "role-markers": Rule(
        "error",
        "a message holds the chat format's own marks as text, so it could open or close a turn",
        "take them out of the message",
    ),
    "bad-row": Rule("error", "the row cannot be trained on", "mend the row or take it out"),
    "blank-answer": Rule("warning", "an answer is empty or blank", "take the row out, or give it an answer"),
    "blank-prompt": Rule("warning", "a user's turn is empty or blank", "take the row out, or give it a question"),
    "cut": Rule("info", "rows were cut to the limit; a cut answer is not taught to stop", "raise --max-length"),
    "dropped": Rule(
        "info", "rows longer than the limit were left out", "raise --max-length, or ask for --too-long cut"
    ),
    "untrained": Rule("warning", "rows have no trained token left and were left out", "raise --max-length"),
    "duplicate": Rule(
        "info", "rows are the same as earlier ones", "take them out if they are not meant to weigh double"
    ),
    "overlap": Rule("warning", "training rows are also asked at test time", "take them out of one of the two"),
    # Against other sources of truth.
    "chat-template": Rule(
        "warning",
        "the model's own chat_template spells conversations differently",
        "choose the --chat-format that fits the model",
    ),
    "known-difference": Rule(
        "info", "the format departs from its owner's on purpose", "nothing; docs/templates.md says why"
    ),
    "other-prompt": Rule(
        "info", "training and test templates differ, as the experiment wants", "nothing, if that is meant"
    ),
    "run-drift": Rule(
        "error",
        "the run's data would be encoded otherwise today",
        "train again, or use the version and files that the run was made with",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing found. `row` is the place in the data (`file:line`), `token` an index into that row's tokens."""

    rule: str
    row: str
    cause: str
    token: int | None = None
    allowed: bool = False

    @property
    def level(self) -> str:
        return "info" if self.allowed else RULES[self.rule].level

    def __str__(self) -> str:
        place = self.row + (f", token {self.token}" if self.token is not None else "")
        return f"{self.level} {self.rule}: {place + ': ' if place else ''}{self.cause}; {RULES[self.rule].remedy}"


def check_names(rules: Iterable[str]) -> None:
    """Raise UserError for a rule to allow that does not exist."""
    for name in rules:
        if name not in RULES:
            raise UserError(f"there is no rule {name!r} to allow; there are: {', '.join(RULES)}")


def worst(findings: Iterable[Finding]) -> str:
    """The highest level among findings; info where there is none."""
    return max((f.level for f in findings), key=LEVELS.index, default="info")


def by_rule(findings: Iterable[Finding]) -> dict[str, int]:
    return dict(Counter(f.rule for f in findings))
