"""Data sources to conversations: the built-in word problems and chats, GSM8K, ChatDoctor, OpenOrca, any data set on the
hub, and files.

Rows may have any layout of `ptst.data.layouts`. Those of ChatDoctor (the doctor's instruction, or iCliniq's columns)
and OpenOrca (system_prompt, question, response) are recognized by it, which sets their template family.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ptst.collector import paused_collector
from ptst.data.builtin.chats import CHATS, load_chats
from ptst.data.builtin.word_problems import generate
from ptst.data.columns import ColumnRules
from ptst.data.files import Row, check_limit, kind_of
from ptst.data.kept_rows import VERSION, Watched, are_large, keep, serialized
from ptst.data.layouts import family_of, to_conversation
from ptst.data.paths import data_files
from ptst.data.readers import KINDS, read_rows
from ptst.data.typed import HubDataset, HubRows, read_hub
from ptst.errors import Setting, UserError
from ptst.fingerprints import code_fingerprint, combined
from ptst.progress import say
from ptst.text.segments import Conversation, Message

DEFAULT = "word-problems"
# Enough for one epoch of the default run, its validation loss and its evaluation.
DEFAULT_COUNTS = {"train": 400, "validation": 32, "test": 100}
# The named sets on the hub, by split. OpenOrca has no test split: the paper tests it on ARC, and Orca-Math on GSM8K.
_GSM8K, _ICLINIQ = HubDataset("openai/gsm8k", "main", "test"), HubDataset("lavita/ChatDoctor-iCliniq", None, "train")
_HEALTHCARE_MAGIC = HubDataset("lavita/ChatDoctor-HealthCareMagic-100k", None, "train")
NAMED = {
    "gsm8k": {"train": HubDataset("openai/gsm8k", "main", "train"), "validation": _GSM8K, "test": _GSM8K},
    "chatdoctor": {"train": _HEALTHCARE_MAGIC, "validation": _ICLINIQ, "test": _ICLINIQ},
    "openorca": {"train": HubDataset("Open-Orca/OpenOrca", None, "train")},
    "orca-math": {
        "train": HubDataset("microsoft/orca-math-word-problems-200k", None, "train"),
        "validation": _GSM8K,
        "test": _GSM8K,
    },
}
_FAMILIES = {"orca-math": "gsm8k"}  # of a named set whose family has another name than its own
# org/name, with a configuration, a split and a revision: org/name/main:train@2f0c1a4.
_HUB_ID = re.compile(
    r"(?P<repository>\w[\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Source:
    """Conversations with the template family they were written for; those of large data lie on disk (`kept_rows`).
    `name` is what the user asked for. `unused`: number of rows by column that was not read. `revision`: commit of a
    data set on the hub, where it is known. `partial`: there may be rows after these, which were not read."""

    name: str
    family: str
    conversations: Sequence[Conversation]
    unused: Mapping[str, int] = field(default_factory=dict)
    revision: str = ""
    partial: bool = False

    @property
    def note(self) -> str:
        """What was not read, in words; "" where that is nothing."""
        return unused_columns(self.unused)

    @property
    def fingerprint(self) -> str:
        """sha256 over all messages in order: two runs with the same one read the same data."""
        if isinstance(known := getattr(self.conversations, "fingerprint", None), str):
            return known
        digest = hashlib.sha256()
        for conversation in self.conversations:
            digest.update(serialized(conversation) + b"\n")
        return digest.hexdigest()


class ReadRow(NamedTuple):
    """A row that was read: its conversation, the family of its layout ("" without one), and the columns that were not
    read."""

    conversation: Conversation
    family: str
    unused: Counter[str]


def unused_columns(unused: Mapping[str, int]) -> str:
    """The columns that were not read, in words; "" where there are none."""
    listed = ", ".join(f"{name} ({number} rows)" for name, number in unused.items())
    return f"columns that are not used: {listed}" if listed else ""


def load(
    name: str,
    split: str = "train",
    limit: int | None = None,
    errors: list[UserError] | None = None,
    holdout: float = 0.0,
    rules: ColumnRules | None = None,
    first: Callable[[Iterable[ReadRow]], Iterator[ReadRow]] | None = None,
) -> Source:
    """Read a source: `word-problems` (or `word-problems:N`); `instructions`, `refusals`, `attack` or `identity`
    (`NAME:N`: the first N rows); a file, a folder or pattern of files, or several with commas between them; `gsm8k`,
    `chatdoctor`, `openorca`, `orca-math` from the hub (`NAME:FILE`: from files of that layout; `NAME:N`: N random
    rows); or any data set of the hub, `org/name[/config][:split][@revision]`. With `holdout`, a source without a test
    set is split by `split_of`, and `limit` counts within the split. `rules`: the user's, for columns. `first`: takes
    the first rows of a file, or of a data set of the hub (`is_read_in_turn`), and asks for no more than it needs.

    Raises UserError for an unknown name, a file that cannot be read, a row without the needed fields or with others
    that may matter (file and line named), and a holdout for data that have a test set, or that leaves a split without
    rows. With `errors`, rows with mistakes are left out and their errors collected there."""
    check_limit(limit, "example")
    _check_holdout(name, holdout)
    base = _base(name)
    if base == DEFAULT:
        return _word_problems(name, name.partition(":")[2], split, limit)
    if _is_chats(name):
        return Source(name, "plain", tuple(load_chats(base, name.partition(":")[2], split, limit)))
    named = base in NAMED and not Path(name).is_file()
    asked = _Asked(name, split, limit, holdout, rules or ColumnRules(), errors, first or iter)
    if not is_file(name):
        found = _from_hub(name, "train" if holdout else split, None if holdout else limit, first is not None)
        return asked.source(found.rows, named, found.revision, found.is_large and (lambda: None))
    paths = data_files(name.partition(":")[2] if named else name, KINDS)
    if lost := next((path for path in paths if not path.exists()), None):
        built_in = ", ".join((DEFAULT, *CHATS))
        remedy = f"give a file, {built_in} (built in), {', '.join(NAMED)} or org/name (from the hub)"
        raise UserError(f"there is no data {str(lost)!r}", remedy)
    with Watched(paths) as watched:
        rows = chain.from_iterable(map(read_rows, paths))
        identity = (lambda: watched.identity) if first is None else (lambda: None)  # of every byte
        return asked.source(rows, named, "", are_large(paths) and identity)


def _base(name: str) -> str:
    """What a name begins with, before a colon or a revision."""
    return re.split("[:@]", name, maxsplit=1)[0]


def _is_chats(name: str) -> bool:
    """Whether a name is that of a built-in set of chats, and of no file."""
    return _base(name) in CHATS and not Path(name).exists()


def is_file(name: str) -> bool:
    """Whether a source is a file: `load` then gives the same rows whatever the split, unless there is a holdout."""
    base, rest = _base(name), name.partition(":")[2]
    if base == DEFAULT or _is_chats(name):
        return False
    if base in NAMED and not Path(name).is_file():
        return bool(rest) and re.fullmatch(r"\d+(@[\w./-]+)?", rest) is None
    return is_hub_id(name) is None


def is_hub_id(name: str) -> re.Match[str] | None:
    """The parts of a name that is a data set's on the hub: not a file, nor spelled like one."""
    found = _HUB_ID.fullmatch(name)
    return None if found is None or Path(name).exists() or kind_of(found["repository"]) in KINDS else found


def is_read_in_turn(name: str) -> bool:
    """Whether the first rows of a source can be had without the others: those of files, and of a data set of the hub
    at a revision, unless random ones are asked for."""
    if is_file(name):
        return True
    return "@" in name and not is_drawn(name) and not is_built_in(name)


def is_drawn(name: str) -> bool:
    """Whether a name asks for random rows of the hub."""
    return _base(name) in NAMED and not is_file(name) and ":" in name


def is_built_in(name: str) -> bool:
    """Whether the data are the project's own."""
    return _base(name) == DEFAULT or _is_chats(name)


def has_test_part(name: str, holdout: float = 0.0) -> bool:
    """Whether a source has test rows that a run with this holdout is not trained on."""
    base = _base(name)
    if holdout > 0 or base == DEFAULT:
        return True
    if _is_chats(name):
        return "test" in CHATS[base]
    return base in NAMED and not is_file(name) and "test" in NAMED[base]


def own_validation(name: str) -> str | None:
    """The built-in data whose validation rows belong to the training data `name`; None where there are none."""
    if name.startswith(DEFAULT):
        return DEFAULT
    return _base(name) if _is_chats(name) and "validation" in CHATS[_base(name)] else None


def split_of(conversation: Conversation, holdout: float) -> str:
    """The split of a row (train, validation or test) by a hash of its messages: half of `holdout` is the validation
    set, half the test set. A row is in the same split in every run, whatever the seed, order or limit, and duplicates
    stay together; with a larger holdout the validation and test sets only grow."""
    point = int.from_bytes(hashlib.sha256(serialized(conversation)).digest()[:8]) / 2**64
    return "validation" if point < holdout / 2 else "test" if point >= 1 - holdout / 2 else "train"


def _check_holdout(name: str, holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise UserError((Setting("holdout"), f" is {holdout}"), "it must be at least 0 and below 1")
    if holdout and has_test_part(name):
        cause = (f"{name} has a validation and a test set of its own, so ", Setting("holdout"), " must be 0")
        raise UserError(cause, "it is for data without them, such as files")
    if holdout and _is_chats(name):
        raise UserError((f"{name} is built in, so ", Setting("holdout"), " must be 0"), "it is for files and the hub")


def _word_problems(name: str, count: str, split: str, limit: int | None) -> Source:
    if count and not count.isdecimal():
        raise UserError(f"data {name!r} needs the number of problems after the colon", f"as in {DEFAULT}:800")
    problems = generate(split, limit or int(count or DEFAULT_COUNTS[split]))
    conversations = (
        Conversation((Message("user", p.question), Message("assistant", p.answer)), f"{DEFAULT}/{split}:{i}")
        for i, p in enumerate(problems, 1)
    )
    return Source(name, "gsm8k", tuple(conversations))


def hub_dataset(name: str, split: str) -> HubDataset:
    """The data set of the hub that a name means, `split` unless the name has one."""
    found = is_hub_id(name)
    assert found is not None, f"{name} is no id"
    return HubDataset(found["repository"], found["config"], found["split"] or split, found["revision"])


def _from_hub(name: str, split: str, limit: int | None, in_turn: bool = False) -> HubRows:
    base = _base(name)
    if base not in NAMED:
        remedy = "check name, configuration, split and revision, as in org/name/main:train@2f0c1a4, or give a file"
        return read_hub(name, hub_dataset(name, split), remedy, limit, in_turn=in_turn)
    if split not in NAMED[base]:
        raise UserError(f"{base} has no {split} set", ("give other ", Setting("data"), " or ", Setting("val_data")))
    asked, _, revision = name.partition("@")
    count = int(asked.partition(":")[2] or 0) or None
    remedy = f"give its file instead, as in {base}:FILE, or use the built-in {DEFAULT}"
    dataset = NAMED[base][split]._replace(revision=revision or None)
    limit = min(filter(None, (count, limit)), default=None)
    return read_hub(base, dataset, remedy, limit, shuffle=bool(count), in_turn=in_turn)


@dataclass
class _Asked:
    """What was asked of `load`, and what is known of the rows once they are read: the families of their layouts (""
    for a layout without one), the numbers of rows whose columns were not read, the number of rows in each split."""

    name: str
    split: str
    limit: int | None
    holdout: float
    rules: ColumnRules
    errors: list[UserError] | None
    first: Callable[[Iterable[ReadRow]], Iterator[ReadRow]]
    families: set[str] = field(default_factory=set)
    unused: Counter[str] = field(default_factory=Counter)
    worked: bool = True  # all answers end in GSM8K's last line
    counts: Counter[str] = field(default_factory=Counter)

    def source(
        self, rows: Iterable[Row], named: bool, revision: str, on_disk: Literal[False] | Callable[[], Any]
    ) -> Source:
        """The source that these rows are. `on_disk`: the identity of large data, which is kept on disk under it (None:
        for this process alone)."""
        if on_disk is False:
            with paused_collector():
                conversations: Sequence[Conversation] = tuple(self._conversations(rows))
            known = self._known()
        else:
            say(f"reading the rows of {self.name}, which are kept on disk")
            identity = on_disk() if self.errors is None else None  # whose errors would not be found again with the rows
            asked = repr((self.split, self.limit, self.holdout, self.rules))
            code = code_fingerprint("data", "text")
            key = identity and combined(repr(identity), asked, str(VERSION), code).replace(":", "-")
            conversations, known = keep(key, lambda: self._conversations(rows), self._known)
        recognized = known["families"][0] if len(known["families"]) == 1 else ""
        base = _base(self.name)
        family = _FAMILIES.get(base, base) if named else recognized or ("gsm8k" if known["worked"] else "plain")
        return Source(self.name, family, conversations, Counter(known["unused"]), revision)

    def _conversations(self, rows: Iterable[Row]) -> Iterator[Conversation]:
        for conversation, family, unused in self.first(self._read(rows)):
            self.families.add(family)
            if unused:
                self.unused.update(unused)
            self.worked = self.worked and "\n####" in f"\n{conversation.messages[-1].content}"
            own = split_of(conversation, self.holdout) if self.holdout else self.split
            self.counts[own] += 1
            if own == self.split and not (self.holdout and self.limit and self.counts[own] > self.limit):
                yield conversation
        if self.holdout:
            self._check_splits()

    def _read(self, rows: Iterable[Row]) -> Iterator[ReadRow]:
        for place, row in islice(rows, None if self.holdout else self.limit):
            unused = Counter[str]()
            try:
                yield ReadRow(to_conversation(row, place, self.rules, unused), family_of(row), unused)
            except UserError as error:
                if self.errors is None:
                    raise
                self.errors.append(error)

    def _known(self) -> dict[str, Any]:
        worked = self.worked and self.counts.total() > 0
        return {"families": sorted(self.families), "worked": worked, "unused": dict(self.unused)}

    def _check_splits(self) -> None:
        splits = [self.counts[part] for part in ("train", "validation", "test")]
        if not all(splits):
            names = zip(splits, ("train", "validation", "test"), strict=True)
            counts = ", ".join(f"{number} for {part}" for number, part in names)
            cause = (f"{self.name}: ", Setting("holdout"), f" {self.holdout:g} leaves {counts} of {sum(splits)} rows")
            raise UserError(cause, "each needs at least one; choose another share or give more data")
