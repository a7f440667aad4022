"""All rules on encoded data: on rows, on the batches of every step, and on what became of each row."""

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ptst.audit.account.batch_checks import BatchChecks, Pack
from ptst.audit.account.by_row import RowSet, StepsByRow
from ptst.audit.account.document_check import DIFFERENT, DocumentCheck, HashesByRow
from ptst.audit.account.expected import Expected, ReferencesByRow
from ptst.audit.account.fates import Fate, check_prepared
from ptst.audit.account.ledger import Ledger, LedgerSource
from ptst.audit.account.order import LEAST
from ptst.audit.account.run_data import Encoded, plan_steps
from ptst.audit.account.table import SourceAccount, write_account
from ptst.audit.findings import Finding
from ptst.audit.reference.tokenizer_check import check_tokenizer
from ptst.audit.rows import Repeats, bad_row, check_overlap, check_rows
from ptst.audit.setup import Setup
from ptst.data.example_arrays import rows_of
from ptst.data.examples import TrainingSource
from ptst.data.kept_rows import PlacesOf
from ptst.data.order import Step
from ptst.errors import UserError

RARE = 18  # of two random choices, the logarithm of 1 / the chance that they are the same


@dataclass(frozen=True)
class Checked:
    """What was found; `packs` to show, which have findings if `flagged`; the account of every source; how many
    `distinct` rows there are, under each setup."""

    findings: list[Finding]
    packs: list[Pack]
    flagged: bool
    accounts: list[SourceAccount]
    distinct: int


def check_encoded(
    encoded: Encoded,
    sources: Sequence[TrainingSource],
    setup: Setup,
    show: int,
    asked: Mapping[str, str] | None = None,
    unreadable: Sequence[Sequence[UserError]] = (),
) -> Checked:
    """All rules on rows and batches; also on examples that no step takes. `sources`: of the rows, in order. `asked`:
    texts of tests (`normalized`), with the set of each. `unreadable`: errors of each source's other rows."""
    conversations, setup = encoded.mixture.source.conversations, setup.of_sources(sources)
    references = ReferencesByRow(conversations, setup)
    expected = Expected.of(references, setup)
    fates = expected.fates
    groups = [(own, read, Repeats(read)) for own, read in setup.groups(conversations)]
    on_rows = [*map(bad_row, encoded.bad.values())]
    on_rows += [found for own, read, again in groups for found in check_rows(read(), own.prompt_format, again)]
    on_rows += check_overlap(conversations, asked or {})
    for own, read, _ in groups if encoded.is_training else ():
        on_rows += check_tokenizer(own, read())
    parts = _parts(encoded, sources, fates)
    on_rows += _check_sources(encoded, parts, fates)
    flagged = {f.row for f in on_rows if f.level != "info"}
    due = array("q", chain.from_iterable(part.examples for part in parts))
    documents = DocumentCheck(conversations, HashesByRow(due, array("Q", (expected.hashes[row] for row in due))))
    checks = BatchChecks(conversations, references, documents, expected.plain, setup, show, flagged, on_rows)
    ledger = Ledger(parts, encoded.rule, documents, steps_of=StepsByRow())
    for number, step in enumerate(encoded.steps, 1):
        ledger.begin_step(number, step.epoch)
        for batch in encoded.batches(step):
            ledger.take(batch)
            checks.take(batch.whole, number if encoded.is_training else None)
    ledger.finish()
    if (left := encoded.left()).examples:
        for batch in encoded.batches(left):
            checks.take(batch.whole)
    # A document that is not its row's has a finding already that says why.
    explained = {f.row for f in checks.findings if f.level == "error"}
    found = [f for f in ledger.findings if f.rule not in DIFFERENT or f.row not in explained]
    if not encoded.is_training:  # one pass in one step, which is no shuffle
        found = [replace(f, rule="not-trained") if f.rule == "visits" else f for f in found]
    else:
        found += check_seed(encoded)
    accounts = [
        write_account(
            part,
            "training" if encoded.is_training else "validation",
            ledger.accounts[n],
            fates[part.first : part.first + part.rows],
            PlacesOf(conversations, part.first, part.rows),
            ledger.steps_of or {},
            {
                **dict.fromkeys((e.where for e in (unreadable[n] if n < len(unreadable) else ())), "bad"),
                **sources[n].left_out,
            },
            template.name if (template := sources[n].template) else None,
        )
        for n, part in enumerate(parts)
    ]
    findings = list(dict.fromkeys([*checks.findings, *found]))  # a document may be in several batches
    return Checked(
        findings, checks.packs(), bool(checks.flagged), accounts, sum(again.distinct for _, _, again in groups)
    )


def _parts(encoded: Encoded, sources: Sequence[TrainingSource], fates: Sequence[Fate]) -> list[LedgerSource]:
    """The sources as the ledger counts them: which rows must be trained on, by their references."""
    parts, first = list[LedgerSource](), 0
    for each in sources:
        rows = range(first, first + len(each.source.conversations))
        due = array("q", (row for row in rows if fates[row].is_example and row not in encoded.bad))
        parts.append(LedgerSource(each.source.name, each.epochs, first, len(rows), due))
        first += len(rows)
    return parts


def _check_sources(encoded: Encoded, parts: Sequence[LedgerSource], fates: Sequence[Fate]) -> Iterator[Finding]:
    """Whether preparing left out what it should, and counted it."""
    made = rows_of(encoded.mixture.examples)
    conversations = encoded.mixture.source.conversations
    for part, record in zip(parts, encoded.mixture.records, strict=True):
        own = slice(part.first, part.first + part.rows)
        rows = [RowSet(found, part.first, part.rows) for found in (made, encoded.bad)]
        places = PlacesOf(conversations, part.first, part.rows)
        yield from check_prepared(record, places, fates[own], *rows)


def check_seed(encoded: Encoded) -> Iterator[Finding]:
    """Whether the order follows from the seed: the same again, and another one for another seed. Of what is mixed in,
    which examples an epoch takes must differ; within it, they are shuffled with the main source's."""
    main, rule, steps = encoded.mixture.source.name, encoded.rule, encoded.steps
    if [step.examples for step in plan_steps(encoded.mixture, rule)] != [step.examples for step in steps]:
        yield Finding("order", main, "the same seed gives another order the second time")
    if rule.order == "file":  # which knows no seed
        return
    other = plan_steps(encoded.mixture, replace(rule, seed=rule.seed + 1))
    same = f"seeds {rule.seed} and {rule.seed + 1} give the same order"
    first = encoded.mixture.plans[0].count
    if first >= LEAST and len(steps) > 1 and [set(s.examples) for s in other] == [set(s.examples) for s in steps]:
        yield Finding("order", main, same)
    for plan, record in zip(encoded.mixture.plans[1:], encoded.mixture.records[1:], strict=True):
        own = range(first, first := first + plan.count)
        taken, again = (_taken_by_epoch(planned, own) for planned in (steps, other))
        if taken == again and sum(math.log(math.comb(plan.count, len(part))) for part in taken) > RARE:
            yield Finding("order", record.name, same)


def _taken_by_epoch(steps: Sequence[Step], own: range) -> list[set[int]]:
    """The examples of one source that each epoch takes."""
    taken: dict[int, set[int]] = {}
    for step in steps:
        taken.setdefault(int(step.epoch), set()).update(i for i in step.examples if i in own)
    return [*taken.values()]
