"""What the audit can find: every rule by name, with its level, what it means and what to do."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from ptst.errors import UserError, unknown_name

LEVELS = ("info", "warning", "error")
LISTED = 20  # findings of one rule that are listed; all are counted
VERDICTS = {"error": "errors found", "warning": "warnings found", "info": "clean"}


@dataclass(frozen=True)
class Rule:
    level: str
    meaning: str
    remedy: str


# By name: what it means, what to do.
_ERRORS = {
    "boundaries": ("documents are not divided as the examples are", "build batches with ptst.data.packing"),
    "position-ids": ("a position is not the token's index in its document", "start at 0 in every document"),
    "labels": ("the label of a trained token is not the next token", "shift labels by one, once"),
    "nothing-trained": ("no token of the row is trained", "raise the length limit or check the loss mask"),
    "prompt-trained": ("a trained token is never sampled by the model", "train answers and terminators only"),
    "answer-untrained": ("a token of an answer is not trained", "derive the loss mask from segments"),
    "terminator-untrained": ("the token that ends an answer is not trained", "train it, also as padding token"),
    "train-on": ("other answers are trained than was asked", "apply train_on and the messages' flags"),
    "mask-shifted": ("the loss mask is shifted by one token", "shift labels by one, once, and the mask with them"),
    "terminator-missing": ("an answer has no terminator", "close every answer as the format does"),
    "terminator-extra": ("a terminator is where the format has none", "close every answer once"),
    "double-bos": ("two BOS tokens in a row", "let the template or the tokenizer add BOS, not both"),
    "missing-bos": ("BOS is missing where the format has one", "put BOS as the format does"),
    "extra-bos": ("a BOS is where the format has none", "put BOS as the format does"),
    "forged-control": ("text of a message became a control token", "encode messages as text"),
    "control-tokens": ("control tokens are not those of the format", "write roles as the format's owner does"),
    "control-spelled": ("a control token was encoded as text", "look control tokens up by name"),
    "system-prompt": ("the system prompt is not the template's", "write the template's system prompt, once"),
    "template-differs": (
        "the row is written in the words of another template, task format or chat format",
        "use one template, task format and chat format for all rows",
    ),
    "row-exchanged": (
        "text of another row is in the row's place, or rows are out of order",
        "keep messages and rows together; of rows that ptst read, report it",
    ),
    "message-differs": ("the text of a message is not the row's", "encode the row's text unchanged"),
    "message-lost": ("a message of the row is missing", "encode every message, or drop the row"),
    "message-extra": ("a message is there that the row does not have", "encode every message once"),
    "turns-swapped": ("messages of the row are in another order", "keep the order of the messages"),
    "text-differs": (
        "the text around the messages is not that of template and chat format",
        "write it as template and chat format do",
    ),
    "unnatural-ids": ("text was encoded in several calls", "encode text between control tokens in one call"),
    "prompt-differs": ("the test prompt is no prefix of the training row", "encode both by the same code"),
    "cut-short": ("the row ends early without being cut", "drop long rows, or choose too_long cut"),
    "unknown-document": ("a document belongs to no row of the data", "report it: preparing or packing changes rows"),
    "not-trained": ("a row is in no batch of an epoch", "report it: an example is lost on the way to the loss"),
    "trained-twice": ("a row is taken twice in an epoch", "report it: an example is doubled on the way to the loss"),
    "visits": ("a source is not taken as often as its epochs say", "report it: the plan of the steps is wrong"),
    "steps": ("a step is not as the settings say", "report it: the plan of the steps is wrong"),
    "order": (
        "the order of examples is no shuffle of the seed, or not that of the data",
        "report it: the order is wrong",
    ),
    "shared-prefix": (
        "sharing prefixes changes the loss",
        "report it: prefixes are shared wrongly",
    ),
    "left-out": ("a row was left out that can be trained on", "report it: preparing loses a row"),
    "miscounted": ("a count is not that of the rows", "report it: preparing counts wrong"),
    "no-example": ("no row of a source is left to train on", "raise the length limit, or check the data"),
    "too-long": ("the row is longer than the limit", "drop or cut it before packing"),
    "role-markers": ("a message holds role markers, which could open or close a turn", "remove them"),
    "control-text": (
        "a message spells a control token of the chat format, as text that is templated already does",
        "give the text without template, or remove it",
    ),
    "bad-row": ("the row cannot be trained on", "correct or remove the row"),
    "chat-template": ("the model's chat template renders otherwise", "choose the chat format of the model"),
    "row-missing": ("a row of the messages is in no batch", "do not drop the last batch; pack every row"),
    "row-repeated": ("several documents are the same row", "sample rows without replacement"),
    "crosses-documents": ("a label belongs to the next document", "ignore the first label of every document"),
    "padding-trained": ("a token of the padding is trained", "ignore it in the labels"),
    "padding-inside": ("padding lies inside of a document", "pad at one end of a row"),
    "attention-mask": ("a trained token is not attended", "mask padding only"),
    "token-ids": ("an id is not one of the model's", "use the model's own tokenizer, and pad with an id of it"),
    "dtype": ("ids are not whole numbers", "give them as 64-bit integers"),
    "row-lost": ("a row of the file has no conversation", "report it: the readers lose a row"),
    "row-twice": ("a row of the file is used more than once", "report it: the readers double a row"),
    "row-unknown": ("a conversation comes from no row that was asked for", "report it: its place is wrong"),
    "row-differs": ("a conversation is not what its row says", "compare the row with docs/data.md"),
    "column-lost": ("a column is left out and not told", "name it with ignore_columns, or report it"),
    "family-differs": ("the rows are of another template family", "set template_family"),
    "split-leak": ("a row of the validation or test set is trained on", "report it: the split is wrong"),
    "selection": ("other rows are drawn or replaced than the settings say", "report it: the wrong rows are trained"),
    "setting-ignored": ("a setting is not what is used", "report it: the command does not do what was asked"),
    "asked-differs": ("the texts of the test are not those of its file", "report it: overlap would be missed"),
    "tokenizer": ("the tokenizer is not what its files say", "report it; use an earlier version until it is mended"),
    "stop-ids": ("an answer ends at other tokens than it should", "report it; or correct eos_token_id in the folder"),
    "run-drift": ("the run's data would be encoded differently today", "train again, or restore version and files"),
}
_WARNINGS = {
    "micro-batch": ("a micro-batch is not as large as it may be", "report it: memory or time is wasted"),
    "marker-text": ("a message spells a marker of chat templates", "is the text templated already?"),
    "lossy-text": ("the tokenizer cannot represent the text", "replace the character, or accept the loss"),
    "blank-answer": ("an answer is empty or blank", "remove the row, or give it an answer"),
    "blank-prompt": ("a user's turn is empty or blank", "remove the row, or give it a question"),
    "untrained": ("rows without a trained token were left out", "raise the length limit"),
    "overlap": ("training rows are also asked at test time", "remove them from one of the two"),
    "all-trained": ("all of a document is trained, its prompt too", "mask prompts, unless this is pretraining"),
    "split-document": ("a document begins in the middle of an answer", "do not divide conversations between rows"),
    "unfinished-answer": ("an answer ends with its document, without a terminator", "was it cut at the length limit?"),
}
_NOTES = {
    "left-out-answers": ("whole answers are not trained", "nothing, if that is meant"),
    "tail-trained": ("whitespace behind the terminator is trained", "nothing; it is never sampled"),
    "part-of-epoch": ("a source is not taken in whole epochs", "nothing, if that is intended"),
    "longer-than-pack": ("an example is longer than a pack", "nothing; it gets a step, or a pack, of its own"),
    "left-padding": ("rows are padded at the left", "nothing, if positions or the attention mask say so"),
    "token-boundary": ("the answer was encoded as a continuation", "nothing; the same happens at test time"),
    "cut": ("rows were cut; a cut answer has no terminator", "raise the length limit"),
    "dropped": ("rows longer than the limit were left out", "raise the length limit, or cut the rows"),
    "unused-column": ("a column of the data is not read", "nothing, if it does not belong to the prompt or the loss"),
    "tag-text": ("a message holds a tag or a foreign marker in its text", "nothing, if it is meant as text"),
    "duplicate": ("rows repeat earlier ones", "remove them unless they should count twice"),
    "template-refuses": ("the model's chat template refuses a conversation", "nothing, if it trains as intended"),
    "blank-system": ("a system prompt is empty or blank", "leave it out, unless it should replace a default one"),
    "known-difference": ("a known difference from the format's owner", "nothing; docs/chat-formats.md says why"),
    "rows-unchecked": ("rows are not compared with their file, or by their cells only", "read a sample of them"),
    "other-prompt": ("training and test templates differ", "nothing, if that is intended"),
}
_LEVELS = {"error": _ERRORS, "warning": _WARNINGS, "info": _NOTES}
RULES = {name: Rule(level, *texts) for level, rules in _LEVELS.items() for name, texts in rules.items()}
# Earlier names; the command line still accepts them after --allow, with a note.
OLD_RULES = {
    "role-marks": "role-markers",
    "own-template": "chat-template",
    "departure": "known-difference",
    "seam": "token-boundary",
    "targets": "labels",
    "positions": "position-ids",
    "rows-exchanged": "row-exchanged",
}


@dataclass(frozen=True)
class Finding:
    """One thing found. `row`: the row of the data (`file:line`). `token`: an index into that row's tokens. `expected`
    and `seen`: what belongs there and what is there, in words."""

    rule: str
    row: str
    cause: str
    token: int | None = None
    allowed: bool = False
    expected: str = ""
    seen: str = ""

    @property
    def level(self) -> str:
        return "info" if self.allowed else RULES[self.rule].level

    @property
    def place(self) -> str:
        """Row and token."""
        return self.row + (f", token {self.token}" if self.token is not None else "")

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        rule = RULES[self.rule]
        return {
            "rule": self.rule,
            "level": self.level,
            "row": self.row,
            "token": self.token,
            "cause": self.cause,
            "expected": self.expected,
            "seen": self.seen,
            "meaning": rule.meaning,
            "remedy": rule.remedy,
            "allowed": self.allowed,
        }

    @property
    def message(self) -> str:
        """The cause with what was expected and seen."""
        both = f" (expected {self.expected}, seen {self.seen})" if self.expected or self.seen else ""
        return f"{self.cause}{both}"

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{self.level} {self.rule}: {place}{self.message}; {RULES[self.rule].remedy}"


class Findings:
    """What every report has: its findings, and what follows from them."""

    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """The highest level among the findings; info if there are none."""
        return max((f.level for f in self.findings), key=LEVELS.index, default="info")

    @property
    def found(self) -> dict[str, int]:
        """Number of findings by rule, in order of appearance."""
        return dict(Counter(f.rule for f in self.findings))

    @property
    def listed(self) -> list[Finding]:
        """The first findings of every rule, so that one rule cannot hide the others."""
        numbers: defaultdict[str, count] = defaultdict(count)
        return [f for f in self.findings if next(numbers[f.rule]) < LISTED]


def check_names(rules: Iterable[str]) -> None:
    """Raise UserError for an unknown rule to allow."""
    for name in rules:
        if name in OLD_RULES:
            raise UserError(f"rule {name!r} was renamed", f"it is {OLD_RULES[name]} now")
        if name not in RULES:
            raise unknown_name("audit rule", name, RULES)
