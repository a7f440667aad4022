"""Documents of foreign batches against the rows that they should be: tokens, loss mask, and what became of every row.

A document may be written as our format writes its row, or as the folder's own chat template does. Choices of trainers
that harm nothing are notes: only the last answers trained, a line break trained behind the terminator, rows cut at one
length.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ptst.audit.batches.documents import ForeignDocument
from ptst.audit.batches.rows import ExpectedRows
from ptst.audit.documents import check_documents
from ptst.audit.findings import Finding
from ptst.audit.owner.forms import Form
from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.errors import UserError
from ptst.text.encode import first_difference
from ptst.text.segments import Conversation

_MASK_RULES = frozenset(("prompt-trained", "answer-untrained", "terminator-untrained", "nothing-trained", "labels"))
_MASK_RULES |= {"mask-shifted", "train-on"}
_BEGINNING = 8  # tokens of a row, by which a document that begins behind another one is known


@dataclass
class Comparison:
    """Takes every document, in order. `findings` has what is wrong with them; `end` what is wrong with all of them."""

    rows: ExpectedRows
    setup: Setup
    asked_for_all: bool = False  # the user said that all answers are trained
    max_length: int | None = None
    findings: list[Finding] = field(default_factory=list)
    unmatched: set[str] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)
    _order: list[int] = field(default_factory=list)
    _seen: Counter[int] = field(default_factory=Counter)
    _names: Counter[str] = field(default_factory=Counter)
    _last_only: list[Finding] = field(default_factory=list)
    _all_trained: int = 0
    _cut: list[tuple[int, Finding]] = field(default_factory=list)
    _tails: list[Finding] = field(default_factory=list)
    _with_tails: int = 0
    _exact: int = 0
    _longest: int = 0
    _alone: bool = True
    _next: int = 0
    _first_place: dict[int, str] = field(default_factory=dict)

    def take(self, d: ForeignDocument) -> None:
        """Compare a document with its row, or, where nothing parts them, the documents in it with theirs."""
        self._longest = max(self._longest, len(d.ids))
        self._alone &= d.alone
        rows = self.rows.exact(d.ids)
        if rows:
            self._one(d, self._choose(rows), exact=True)
            return
        parts = self._divided(d)
        if parts:
            self._not_parted(d, parts)
            return
        self._damaged(d)

    def _damaged(self, d: ForeignDocument) -> None:
        """A document that is no row as it is."""
        row = self.rows.likely(d.ids, self._expected())
        if row is None or row in self.rows.errors:
            self.unmatched.add(d.place)
        else:
            self._one(d, row, exact=False)

    def _expected(self) -> int:
        """The row that comes next, if documents come in order."""
        while self._next in self.rows.errors:
            self._next += 1
        return self._next

    def _choose(self, rows: list[int]) -> int:
        """Of rows with the same ids, the expected one, else the first that no document was yet."""
        if (expected := self._expected()) in rows:
            return expected
        return next((row for row in rows if not self._seen[row]), rows[0])

    def _one(self, d: ForeignDocument, row: int, exact: bool) -> None:
        self._order.append(row)
        self._seen[row] += 1
        self._first_place.setdefault(row, d.place)
        self._next = row + 1
        self._exact += exact
        source = self.rows.conversations[row].source
        place = f"{d.place} ({source})" if source else d.place
        self.compared.add(d.place)
        if exact:
            form = next(f for f in self.rows.forms(row) if f.ids == d.ids)
            if form.name:
                self._names[form.name] += 1
        else:
            form = self._nearest(d, row, place)
        if d.known and form.ids[: len(d.ids)] == d.ids:
            self._mask(d, row, form, place)

    def _nearest(self, d: ForeignDocument, row: int, place: str) -> Form:
        """The form that a damaged document is nearest to, after its findings were taken."""
        forms = self.rows.forms(row)
        form = max(forms, key=lambda f: _alike(d.ids, f.ids))
        if form.ids[: len(d.ids)] == d.ids:
            whole = max((f for f in forms if f.ids[: len(d.ids)] == d.ids), key=lambda f: len(f.ids))
            cause = f"{len(d.ids)} of {len(whole.ids)} tokens"
            self._cut.append((len(d.ids), Finding("cut-short", place, cause, len(d.ids) - 1)))
            return whole
        if form.name == "" or _alike(d.ids, forms[0].ids) >= _alike(d.ids, form.ids):
            self.findings += [f for f in self._by_rules(d, row, place, form) if f.level != "info"]
        else:
            text = "\n".join(m.content for m in self.rows.conversations[row].messages)
            self.findings.append(self._differs(d, form, place, text))
        return form

    def _by_rules(self, d: ForeignDocument, row: int, place: str, form: Form) -> list[Finding]:
        """The findings of our own rules, as on a batch of ours."""
        own = replace(self.setup.prompt_format, allow_role_markers=True)
        setup = replace(self.setup, prompt_format=own)
        if self.max_length is not None:
            setup = replace(setup, max_length=self.max_length, too_long="cut")
        trained = d.trained if d.known else [*form.loss_mask, *[False] * len(d.ids)][: len(d.ids)]
        batch = as_batch(d.ids, trained, row)
        found = check_documents(batch, self.rows.conversations, setup)
        found = [replace(f, row=place) for f in found if f.rule != "too-long"]
        return found if d.known else [f for f in found if f.rule not in _MASK_RULES]

    def _differs(self, d: ForeignDocument, form: Form, place: str, text: str) -> Finding:
        """The first difference from the folder's chat template. `text`: the row's messages."""
        tokenizer, at = self.setup.prompt_format.tokenizer, first_difference(d.ids, form.ids)
        names = tokenizer.control_names
        got, wanted = (names.get(ids[at]) if at < len(ids) else "" for ids in (d.ids, form.ids))
        seen, expected = (
            repr(tokenizer.decode(ids[at : at + 4])) if at < len(ids) else "the end" for ids in (d.ids, form.ids)
        )
        stops = {names.get(i) for i in self.setup.prompt_format.stop_ids}
        bos = tokenizer.bos
        spelled = [i for i, t in enumerate(d.ids) if i >= at and t in names and names[t] in text]
        crosses = at + 1 < len(form.ids) and form.loss_mask[at + 1] and not form.loss_mask[at]
        if spelled and Counter(d.ids)[d.ids[spelled[0]]] > Counter(form.ids)[d.ids[spelled[0]]]:
            rule, at = "forged-control", spelled[0]
        elif got and got == bos:
            before = at and d.ids[at - 1] == d.ids[at]
            rule = "double-bos" if before or (at + 1 < len(form.ids) and wanted == bos) else "extra-bos"
        elif wanted and wanted == bos:
            rule = "missing-bos"
        elif got in stops:
            rule = "terminator-extra"
        elif wanted in stops:
            rule = "terminator-missing"
        elif tokenizer.decode(d.ids) == tokenizer.decode(form.ids):
            rule = "prompt-differs" if crosses else "unnatural-ids"
        else:
            rule = "control-tokens" if got or wanted else "text-differs"
        cause = f"the document is not as {form.name} writes it"
        return Finding(rule, place, cause, at, expected=expected, seen=seen)

    def _mask(self, d: ForeignDocument, row: int, form: Form, place: str) -> None:
        """The loss mask of a document whose tokens are a form's, or begin as one."""
        size = len(d.ids)
        expected, trained = form.loss_mask[:size], [*form.loss_mask[:1], *d.trained[1:]]
        tails = {i for i in _tails(form, size, self.setup) if trained[i] and not expected[i]}
        bare = [own and i not in tails for i, own in enumerate(trained)]
        if tails:  # what else is wrong with the document is a finding of its own
            self._tails.append(Finding("prompt-trained", place, "what follows the terminator is trained", min(tails)))
            trained = bare
        self._with_tails += any(trained[1:]) and bool(_tails(form, size, self.setup))
        if not any(expected[1:]) and not any(trained[1:]) and any(form.loss_mask):
            self.findings.append(Finding("nothing-trained", place, "the row is cut before its first answer", 0))
            return
        if trained == expected:
            self._all_trained += len([e for e in form.ends if e < size]) > 1
            return
        if trained == _last_answer(expected) and any(trained):
            at = expected.index(True)
            self._last_only.append(Finding("answer-untrained", place, "only the last answer is trained", at))
            return
        self.findings += mask_findings(trained, expected, form.ends, place)

    def _divided(self, d: ForeignDocument) -> list[tuple[int, int, int]]:
        """(start, end, row) of the documents in a row that nothing parts; none if it is not rows one after another."""
        parts: list[tuple[int, int, int]] = []
        start, choice, rest = 0, self._next, d.ids
        while rest and (found := self.rows.begins(rest)):
            rows, length = found
            row = next((r for r in rows if r >= choice), rows[0])
            parts.append((start, start + length, row))
            start, choice, rest = start + length, row + 1, rest[length:]
        cut = len(parts) == 1 and len(rest) > _BEGINNING and self.rows.some_begins(rest)
        return parts if len(parts) > 1 or cut else []

    def _not_parted(self, d: ForeignDocument, parts: list[tuple[int, int, int]]) -> None:
        second = parts[1] if len(parts) > 1 else (parts[0][1], len(d.ids), -1)
        source = self.rows.conversations[second[2]].source if second[2] >= 0 else "the rest of another"
        cause = f"another document begins here ({source}), and nothing parts them, so that they see each other"
        self.findings.append(Finding("boundaries", d.place, cause, second[0]))
        for number, (start, end, row) in enumerate(parts):
            place = d.place if number == 0 else f"{d.place}, document {number}"
            self._one(ForeignDocument(place, d.ids[start:end], d.trained[start:end], d.alone, d.known), row, exact=True)
        rest = d.ids[parts[-1][1] :]
        if rest:
            tail = ForeignDocument(f"{d.place}, the rest", rest, d.trained[parts[-1][1] :], False, d.known)
            self._damaged(tail)

    def end(self) -> Iterator[Finding]:
        """What all documents together show. Raises UserError where the messages are not of these rows."""
        self._check_related()
        self._check_order()
        yield from self.findings
        yield from self._choices()
        yield from self._conserved()
        for name, number in self._names.items():
            cause = f"{number} of {len(self._order)} documents are as {name} writes them, which is not our format"
            yield Finding("known-difference", "", cause)

    def _check_related(self) -> None:
        total = len(self._order) + len(self.unmatched)
        if total and len(self.unmatched) > total // 2 and not self._exact:
            cause = (
                f"{len(self.unmatched)} of {total} documents are none of the {len(self.rows.conversations)} messages"
            )
            raise UserError(cause, "give the rows' own messages, and the model whose tokenizer wrote the ids")

    def _check_order(self) -> None:
        """Raise UserError if the rows are all there and right, in another order: then the order is what is wrong."""
        clean = self._exact == len(self._order) and not self.unmatched and not self.findings
        whole = (
            len(self._order) == len(self.rows.conversations) - len(self.rows.errors)
            and max(self._seen.values(), default=0) == 1
        )
        if clean and whole and self._alone and (at := _unsorted(self._order)) is not None:
            row = self._order[at]
            cause = f"row {at + 1} is {self.rows.conversations[row].source}: the messages are in another order"
            raise UserError(cause, "give them in the order of the rows")

    def _choices(self) -> Iterator[Finding]:
        """Choices of the trainer, which are notes where all documents share them."""
        if self._last_only and not self._all_trained and not self.asked_for_all:
            cause = f"only the last answer is trained, in all {len(self._last_only)} documents of several"
            yield Finding("left-out-answers", self._last_only[0].row, cause, self._last_only[0].token)
        else:
            yield from self._last_only
        lengths = {length for length, _ in self._cut}
        limit = self.max_length or self._longest
        if self._cut and lengths == {limit} and (len(self._cut) > 1 or self.max_length):
            yield Finding("cut", "", f"{len(self._cut)} documents, all at {limit} tokens")
        else:
            yield from (finding for _, finding in self._cut)
        yield from shared_tails(self._tails, self._with_tails)

    def _conserved(self) -> Iterator[Finding]:
        """Rows that no document is, documents that are no row, rows that several are."""
        for row, error in self.rows.errors.items():
            yield Finding("bad-row", self.rows.conversations[row].source, str(error.cause))
        for place in sorted(self.unmatched):
            yield Finding("unknown-document", place, "it is none of the messages")
        total = len(self.rows.conversations)
        lost = [row for row in range(total) if not self._seen[row] and row not in self.rows.errors]
        behind = [row for row in lost if row > max(self._order, default=-1)]
        for row in lost[: len(lost) - len(behind)]:
            yield Finding("row-missing", self.rows.conversations[row].source, "no document is this row")
        if behind:
            last = self.rows.conversations[total - 1].source
            more = f"and all behind it up to {last} ({len(behind)} rows)" if len(behind) > 1 else "the last one"
            yield Finding("row-missing", self.rows.conversations[behind[0]].source, f"no document is this row, {more}")
        for row, number in self._seen.items():
            if number > 1:
                cause = f"{number} documents are this row, the first {self._first_place[row]}"
                yield Finding("row-repeated", self.rows.conversations[row].source, cause)


def as_batch(ids: list[int], trained: list[bool], row: int) -> Batch:
    """A document of a row as a batch of ours."""
    labels = [i if own else IGNORE_INDEX for i, own in zip(ids[1:], trained[1:], strict=True)] + [IGNORE_INDEX]
    return Batch(ids, list(range(len(ids))), [0, len(ids)], labels, [row])


def mask_findings(
    trained: list[bool], expected: list[bool], ends: Iterable[int], place: str, what: str = "prompt-trained"
) -> Iterator[Finding]:
    """How a loss mask differs from the right one; the first token has no label in either."""
    if not any(trained[1:]) and any(expected[1:]):
        yield Finding("nothing-trained", place, f"none of {len(trained)} tokens is trained", 0)
        return
    wrong: dict[str, list[int]] = {}
    ends = set(ends)
    for i in range(1, len(trained)):
        if expected[i] and not trained[i]:
            wrong.setdefault("terminator-untrained" if i in ends else "answer-untrained", []).append(i)
        elif trained[i] and not expected[i]:
            wrong.setdefault(what, []).append(i)
    for rule, places in wrong.items():
        number = f"{len(places)} {'token' if len(places) == 1 else 'tokens'}"
        yield Finding(rule, place, number, places[0])


def shared_tails(tails: list[Finding], number: int) -> Iterator[Finding]:
    """Whitespace trained behind terminators: a note if it is in all documents that have some."""
    if tails and len(tails) == number:
        cause = f"{tails[0].cause}, in all {number} documents, and is never sampled"
        yield Finding("tail-trained", tails[0].row, cause, tails[0].token)
    else:
        yield from tails


def _tails(form: Form, size: int, setup: Setup) -> set[int]:
    """Indices of the whitespace that follows a terminator."""
    tokenizer, out = setup.prompt_format.tokenizer, set()
    for end in form.ends:
        i = end + 1
        while i < size and form.ids[i] not in tokenizer.control_names and not tokenizer.decode([form.ids[i]]).strip():
            out.add(i)
            i += 1
    return out


def _last_answer(mask: list[bool]) -> list[bool]:
    """The mask with only its last trained run."""
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [start <= i < end for i in range(len(mask))]


def _alike(a: list[int], b: list[int]) -> int:
    """How many tokens agree at the beginning and the end."""
    first = first_difference(a, b)
    rest = min(len(a), len(b)) - first
    return first + min(rest, first_difference(a[::-1], b[::-1]))


def _unsorted(order: list[int]) -> int | None:
    return next((i for i in range(1, len(order)) if order[i] < order[i - 1]), None)


def renamed(conversations: Iterable[Conversation], name: str) -> list[Conversation]:
    """The conversations, those without a source by their number."""
    return [c if c.source else replace(c, source=f"{name}:{i}") for i, c in enumerate(conversations, 1)]
