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
        reference, prompt = references.get(row), prompts.get(row)
        if not isinstance(reference, Reference) or not isinstance(prompt, Example) or reference.lossy:
            return False
        own = setup.of_row(row)
        ids = limited(reference.ids, own)
        size, trained = len(ids), reference.loss_mask[1 : len(ids)]
        too_long = own.max_length is not None and size > own.max_length
        if too_long or True not in trained or ids[: len(prompt.ids)] != prompt.ids[:size]:
            return False
        tokens += ids
        labels += [i if flag else IGNORE_INDEX for i, flag in zip(ids[1:], trained, strict=True)]
        labels.append(IGNORE_INDEX)
        positions += range(size)
        bounds.append(len(tokens))
    seen = batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens
    return seen == (tokens, labels, positions, bounds)
