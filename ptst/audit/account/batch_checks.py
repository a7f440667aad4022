"""All rules on the batches of a run, each document once, and the packs that the report shows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ptst.audit.account.document_check import DocumentCheck, batch_hashes
from ptst.audit.documents import check_documents
from ptst.audit.findings import Finding
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.audit.shape import check_shape
from ptst.audit.view import TokenView, view
from ptst.data.kept_rows import place_of
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.errors import UserError
from ptst.text.encode import Example
from ptst.text.segments import Conversation


@dataclass(frozen=True)
class Pack:
    """A micro-batch that is shown. `step`: the first that it is of; None for examples that no step takes, and for a
    validation set. `documents`: the row of each document, and its tokens."""

    step: int | None
    batch: Batch
    documents: list[tuple[str, list[TokenView]]]


@dataclass
class BatchChecks:
    """Takes every batch and applies the rules to it: of its documents those that were in no batch before. `references`:
    by row, what its document must be; `documents` knows its hash, and where `plain` is 1, nothing is to be said of a
    document with that one. `flagged`: rows with findings; batches with them are shown first."""

    conversations: Sequence[Conversation]
    references: Mapping[int, Reference | UserError]
    documents: DocumentCheck
    plain: Sequence[int]
    setup: Setup
    show: int
    flagged: set[str]
    findings: list[Finding] = field(default_factory=list)
    _kept: list[tuple[bool, int | None, Batch]] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._seen_plain = bytearray(len(self.conversations))

    def take(self, batch: Batch, step: int | None = None) -> None:
        """Check a batch; one of `step`, if it is of one."""
        if self.documents.agrees(batch) and all(self.plain[row] for row in batch.rows):
            if not all(self._seen_plain[row] for row in batch.rows):
                self._keep(batch, step)
            for row in batch.rows:
                self._seen_plain[row] = 1
            return
        new = {(row, number) for row, number in zip(batch.rows, batch_hashes(batch), strict=False)} - self._seen
        if not new and len(batch.rows) == len(batch.cu_seqlens) - 1:
            self.findings += check_shape(batch, self.conversations)
            return
        self._seen |= new
        found = check_documents(batch, self.conversations, self.setup, self.references)
        self.findings += found
        self.flagged |= {f.row for f in found if f.level != "info"}
        self._keep(batch, step)

    def _keep(self, batch: Batch, step: int | None) -> None:
        places = {place_of(self.conversations, row) for row in batch.rows if 0 <= row < len(self.conversations)}
        flagged = not self.flagged.isdisjoint(places)
        if sum(kept[0] == flagged for kept in self._kept) < self.show:
            self._kept.append((flagged, step, batch))

    def packs(self) -> list[Pack]:
        """What is shown: batches with findings first."""
        first = sorted(self._kept, key=lambda kept: not kept[0])[: self.show]
        return [show_pack(batch, self.conversations, self.references, self.setup, step) for _, step, batch in first]


def show_pack(
    batch: Batch,
    conversations: Sequence[Conversation],
    references: Mapping[int, Reference | UserError],
    setup: Setup,
    step: int | None = None,
) -> Pack:
    """A batch with every document's tokens: ids, positions and labels are the batch's own."""
    documents = []
    for number, (start, end) in enumerate(pairwise(batch.cu_seqlens)):
        row = batch.rows[number] if number < len(batch.rows) else -1
        if not (0 <= row < len(conversations) and start < end):
            continue  # a finding says so
        conversation, reference, labels = conversations[row], references[row], batch.labels[start:end]
        known, own = None if isinstance(reference, UserError) else reference, setup.of_row(row)
        boundaries = () if known is None else tuple(known.token_boundaries)
        loss_mask = [False, *(label != IGNORE_INDEX for label in labels[:-1])]
        alone = view(Example(batch.tokens[start:end], loss_mask, boundaries, row=row), conversation, own, known)
        tokens = [
            replace(token, document=number, position=position, label=None if label == IGNORE_INDEX else label)
            for token, position, label in zip(alone, batch.position_ids[start:end], labels, strict=True)
        ]
        documents.append((conversation.source, tokens))
    return Pack(step, batch, documents)


def rows_of(packs: Sequence[Pack], flagged: Collection[str], show: int) -> list[tuple[str, list[TokenView]]]:
    """The first documents of the packs, those of flagged rows first."""
    documents = [document for pack in packs for document in pack.documents]
    return sorted(documents, key=lambda document: document[0] not in flagged)[:show]
