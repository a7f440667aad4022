"""Training's gate: no run starts and no step is taken on an error that is not allowed. Its verdict on data that were
checked before is remembered (`ptst.audit.account.verdicts`)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ptst.audit.account import verdicts
from ptst.audit.account.expected import build_references
from ptst.audit.account.fates import Fate, check_prepared, find_fate
from ptst.audit.account.verdicts import Warning
from ptst.audit.documents import check_documents
from ptst.audit.findings import RULES, Finding
from ptst.audit.reference.tokenizer_check import check_tokenizer
from ptst.audit.rows import check_rows
from ptst.audit.setup import Setup
from ptst.data.examples import TrainingSource
from ptst.data.sources import Source
from ptst.data.step_batches import StepBatches
from ptst.errors import Setting, UserError
from ptst.records import DataRecord
from ptst.text.encode import Example

CHUNK = 2048  # rows


def refuse(findings: Iterable[Finding], allow: Iterable[str] = ()) -> None:
    """Raise UserError for the first finding of error level whose rule is not allowed."""
    allowed = set(allow)
    errors = [f for f in findings if f.level == "error" and f.rule not in allowed]
    if errors:
        first, more = errors[0], len(errors) - 1
        rest = f" ({more} more: python -m ptst.audit lists them)" if more else ""
        remedy = (f"{RULES[first.rule].remedy}, or allow it with ", Setting("allow"), f" {first.rule}{rest}")
        raise UserError(f"{first.rule}: {first.cause}", remedy, first.place)


@dataclass(frozen=True)
class Prepared:
    """Data that a run takes: the rows of one or more sources, their examples, and a record of each source. `sources`:
    those of training, which may have templates of their own."""

    source: Source
    examples: Sequence[Example]
    records: Sequence[DataRecord] = ()
    sources: Sequence[TrainingSource] = ()


def check_start(
    data: Sequence[Prepared],
    setup: Setup,
    micro_batch_tokens: int,
    allow: Iterable[str],
    key: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> list[str]:
    """Apply all rules to rows and batches before the first step; returns one line for each kind of warning. Raises
    UserError for an error that is not allowed. `key`: of all that the verdict depends on, under which it is remembered;
    `say` gets a line where it was."""
    allowed = set(allow)
    warnings = None if key is None else verdicts.recall(key)
    if warnings is None:
        findings = [f for part in data for f in _check(part, setup, micro_batch_tokens)]
        refuse(findings, allowed)
        warnings = _summary(findings)
        if key is not None and not any(f.level == "error" for f in findings):
            verdicts.remember(key, warnings)
    else:
        rows = sum(len(part.source.conversations) for part in data)
        say(f"the audit of these {rows} rows is remembered from an earlier run of the same settings and version")
    return [
        f"warning: {RULES[w.rule].meaning} in {w.number} places, the first at {w.row}: {w.cause}"
        for w in warnings
        if w.rule not in allowed
    ]


def _check(part: Prepared, setup: Setup, micro_batch_tokens: int) -> list[Finding]:
    """All rules on the rows and examples of a part, CHUNK rows at a time: references of all rows would take several
    times the memory of the examples."""
    conversations, setup = part.source.conversations, setup.of_sources(part.sources)
    found: list[Finding] = []
    for of_rows, group in setup.groups(conversations):
        found += [*check_tokenizer(of_rows, group), *check_rows(group, of_rows.prompt_format)]
    fates: list[Fate] = []
    chunks: dict[int, list[Example]] = {}
    for example in part.examples:
        chunks.setdefault(example.row // CHUNK, []).append(example)
    for number in sorted({*chunks, *range(-(-len(conversations) // CHUNK))}):
        first, own = number * CHUNK, chunks.get(number, [])
        chunk = conversations[max(0, first) : first + CHUNK]
        references = dict(enumerate(build_references(chunk, setup, first), first))
        fates += [find_fate(reference, setup) for reference in references.values()]
        for batch in StepBatches(own, range(len(own)), micro_batch_tokens, share=False):
            found += check_documents(batch.whole, conversations, setup, references)
    made = {e.row for e in part.examples}
    ends = [*accumulate(record.rows for record in part.records)]
    for record, end in zip(part.records, ends, strict=True):
        rows = range(end - record.rows, end)
        taken = {row - rows.start for row in made.intersection(rows)}
        places = [conversations[row].source for row in rows]
        found += check_prepared(record, places, fates[rows.start : end], taken, ())
    return list(dict.fromkeys(found))


def _summary(findings: Iterable[Finding]) -> list[Warning]:
    """The warnings, one for each rule."""
    warnings: dict[str, list[Finding]] = {}
    for f in findings:
        if f.level == "warning":
            warnings.setdefault(f.rule, []).append(f)
    return [Warning(rule, len(found), found[0].row, found[0].cause) for rule, found in warnings.items()]
