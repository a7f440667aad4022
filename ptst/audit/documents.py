"""The rules on what the loss function gets: first a batch, then each of its documents against its row, as the reference
formats write it. One cause gives one finding: what follows from it is left out."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TypeVar

from ptst.audit.causes.batch import Bounds, why_bounds_differ, why_labels_differ, why_positions_differ
from ptst.audit.causes.characters import difference
from ptst.audit.causes.compared import Cause, Compared, limited
from ptst.audit.causes.find import why_tokens_differ
from ptst.audit.causes.mask import why_masks_differ
from ptst.audit.causes.other_rows import OtherRows, other_rows
from ptst.audit.findings import Finding
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.audit.shape import check_shape
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.errors import UserError
from ptst.text.encode import Example, first_difference
from ptst.text.segments import Conversation

Found = TypeVar("Found")
_IN_DETAIL = ("boundaries", "labels", "position-ids")  # rules of the shape that are applied here to every document


def check_documents(
    batch: Batch,
    conversations: Sequence[Conversation],
    setup: Setup,
    references: Sequence[Reference | UserError] | Mapping[int, Reference | UserError] | None = None,
) -> list[Finding]:
    """All rules on a batch: its shape, then each document against the row that it came from, under the setup of the
    row's source. `references`: by row, what its document must be, or why the row has none; built here if not given."""
    shape = check_shape(batch, conversations)
    if any(not 0 <= row < len(conversations) for row in batch.rows):
        number, row = next((n, r) for n, r in enumerate(batch.rows) if not 0 <= r < len(conversations))
        cause = f"the row of document {number} is {row}, of {len(conversations)}"
        return [*shape, Finding("unknown-document", "batch", cause, batch.cu_seqlens[: number + 1][-1])]
    rows = [conversations[row] for row in batch.rows]
    setups = [setup.of_row(row) for row in batch.rows]
    expected = (
        [references[row] for row in batch.rows]
        if references is not None
        else _by_setup(rows, setups, lambda own, part: own.oracle.references(part, own.train_on))
    )
    said = [() if isinstance(r, UserError) else limited(r.ids, setup) for r in expected]
    bounds = why_bounds_differ(batch, said) if all(said) else Bounds({}, set())
    if any(f.rule == "boundaries" for f in shape) and not bounds.causes:
        return shape  # documents cannot be separated, so they cannot be compared
    explained = {rows[number].source for number in bounds.explained}
    own = [f for f in shape if f.rule not in _IN_DETAIL and f.row not in explained]
    batch_rules = {f.rule for f in shape}
    causes = _causes(batch, rows, expected, bounds, batch_rules, setups, other_rows(conversations))
    return own + [
        Finding(cause.rule, rows[number].source, cause.words, cause.token, False, *cause.shown)
        for number, cause in sorted(causes, key=lambda found: found[0])
    ]


def _causes(
    batch: Batch,
    rows: Sequence[Conversation],
    expected: Sequence[Reference | UserError],
    bounds: Bounds,
    batch_rules: Set[str],
    setups: Sequence[Setup],
    others: OtherRows,
) -> Iterator[tuple[int, Cause]]:
    """The causes by document. `batch_rules`: those that the batch's shape breaks. `setups`: of each document."""
    yield from bounds.causes.items()
    whole = len(bounds.explained) == len(rows)  # one cause for all of the batch
    labels = dict(why_labels_differ(batch)) if "labels" in batch_rules and not whole else {}
    positions = why_positions_differ(batch) if "position-ids" in batch_rules and not whole else ()
    for number, cause in (*positions, *labels.items()):
        if number not in bounds.explained and cause is not None:
            yield number, cause
    prompts = _by_setup(rows, setups, lambda own, part: own.prompt_format.encode_all([row.prompt() for row in part]))
    for number, (written, prompt) in enumerate(zip(expected, prompts, strict=True)):
        if number in bounds.explained:
            continue
        start, end = batch.cu_seqlens[number : number + 2]
        if isinstance(written, UserError):
            yield number, Cause("bad-row", None, _sentence(written))
            continue
        loss_mask = [False, *(label != IGNORE_INDEX for label in batch.labels[start : end - 1])]
        c = Compared(batch.tokens[start:end], loss_mask, written, rows[number], setups[number], others)
        for cause in _document_causes(c, number in labels, prompt):
            yield number, cause


def _by_setup(
    rows: Sequence[Conversation],
    setups: Sequence[Setup],
    work: Callable[[Setup, list[Conversation]], Sequence[Found | UserError]],
) -> list[Found | UserError]:
    """What `work` makes of each row, those of the same setup in one call."""
    found: dict[int, Found | UserError] = {}
    for own in {id(setup): setup for setup in setups}.values():
        numbers = [number for number, setup in enumerate(setups) if setup is own]
        found |= zip(numbers, work(own, [rows[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(rows))]


def _sentence(error: UserError) -> str:
    return UserError(error.cause, error.remedy).tell(lambda name: f"the setting {name}")


def _document_causes(c: Compared, labels_wrong: bool, prompt: Example | UserError) -> Iterator[Cause]:
    """What is wrong with one document. Where its labels are not its tokens, its loss mask says nothing. `prompt`: the
    one at test time."""
    for start, run in c.reference.runs:
        if start in c.reference.lossy:
            at, *shown = difference(run.text, c.reference.lossy[start])
            yield Cause("lossy-text", start, f"character {at} of the text is lost", *shown)
    for boundary in c.reference.token_boundaries:
        if boundary < len(c.ids):
            yield Cause("token-boundary", boundary, "prompt and answer are not encoded in one call")
    why = None if c.tokens_agree else why_tokens_differ(c)
    if why is not None:
        yield why
    if not labels_wrong:
        yield from why_masks_differ(c, why)
    limit = c.setup.max_length
    if limit is not None and len(c.ids) > limit:
        yield Cause("too-long", limit, f"{len(c.ids)} tokens, the limit is {limit}")
    if isinstance(prompt, UserError):
        yield Cause("prompt-differs", 0, f"there is no prompt at test time: {_sentence(prompt)}")
    elif c.ids[: len(prompt.ids)] != prompt.ids[: len(c.ids)]:
        at = first_difference(c.ids, prompt.ids)
        if why is None or at < (why.token or 0):  # else the same difference
            words = "training and test encode the prompt differently"
            yield Cause("prompt-differs", at, words, c.show(prompt.ids, at), c.show(c.ids, at))
