"""Whether a batch is, in every token, position, label and boundary, what the references of its rows make it. So it is
with nearly all batches; of the others, `audit.documents` says why."""

from collections.abc import Mapping

from ptst.audit.causes.compared import limited
from ptst.audit.reference.formats import Reference
from ptst.audit.setup import Setup
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.errors import UserError
from ptst.text.encode import Example


def agrees(
    batch: Batch,
    references: Mapping[int, Reference | UserError],
    prompts: Mapping[int, Example | UserError],
    setup: Setup,
) -> bool:
    """Whether `check_documents` would find nothing but notes. `references` and `prompts`, by row: what its document
    must be, and its prompt at test time; False for a row without either."""
    tokens, labels, positions, bounds = list[int](), list[int](), list[int](), [0]
    for row in batch.rows:
        reference = references.get(row)
        if (ids := agreed_ids(reference, prompts.get(row), setup.of_row(row))) is None:
            return False
        assert isinstance(reference, Reference)
        tokens += ids
        labels += [i if flag else IGNORE_INDEX for i, flag in zip(ids[1:], reference.loss_mask[1:], strict=False)]
        labels.append(IGNORE_INDEX)
        positions += range(len(ids))
        bounds.append(len(tokens))
    seen = batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens
    return seen == (tokens, labels, positions, bounds)


def agreed_ids(
    reference: Reference | UserError | None, prompt: Example | UserError | None, setup: Setup
) -> list[int] | None:
    """The ids of the document that a row must be, if nothing but notes is to be said of that; else None."""
    if not isinstance(reference, Reference) or not isinstance(prompt, Example) or reference.lossy:
        return None
    ids = limited(reference.ids, setup)
    too_long = setup.max_length is not None and len(ids) > setup.max_length
    trained = True in reference.loss_mask[1 : len(ids)]
    return ids if trained and not too_long and ids[: len(prompt.ids)] == prompt.ids[: len(ids)] else None
