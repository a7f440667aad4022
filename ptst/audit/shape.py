"""The cheap rules, which need a batch alone: boundaries, positions, labels, something trained."""

from collections.abc import Sequence
from itertools import pairwise

from ptst.audit.findings import Finding
from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.text.encode import first_difference
from ptst.text.segments import Conversation


def check_shape(batch: Batch, conversations: Sequence[Conversation]) -> list[Finding]:
    """The cheap rules, applied to every batch of a training run: boundaries, positions, labels, something trained."""
    cu, rows = batch.cu_seqlens, batch.rows

    def finding(rule: str, cause: str, token: int) -> Finding:
        """At a token of the batch: its row, and its index in its document."""
        index = max((i for i, start in enumerate(cu[:-1]) if start <= token), default=0)
        row = rows[min(index, len(rows) - 1)] if rows else -1
        source = conversations[row].source if 0 <= row < len(conversations) else "batch"
        return Finding(rule, source, cause, token - cu[index])

    lengths = {len(batch.tokens), len(batch.position_ids), len(batch.labels), cu[-1] if cu else 0}
    if len(cu) != len(rows) + 1 or cu[0] != 0 or len(lengths) > 1 or any(b <= a for a, b in pairwise(cu)):
        jump = next((i for i, p in enumerate(batch.position_ids) if p != i), cu[-1] if cu else 0)
        cause = f"{len(rows)} documents of {len(batch.tokens)} tokens have the boundaries {cu}"
        return [finding("boundaries", cause, jump) if len(cu) > 1 else Finding("boundaries", "batch", cause, 0)]
    found = []
    expected = [p for a, b in pairwise(cu) for p in range(b - a)]
    if batch.position_ids != expected:
        wrong = first_difference(batch.position_ids, expected)
        cause = f"position {batch.position_ids[wrong]} instead of {expected[wrong]}"
        found.append(finding("position-ids", cause, wrong))
    last = set(cu[1:])
    for i, (label, after) in enumerate(zip(batch.labels, [*batch.tokens[1:], IGNORE_INDEX], strict=False)):
        if label != IGNORE_INDEX and (label != after or i + 1 in last):
            what = "the document's end" if i + 1 in last else f"token {after}"
            found.append(finding("labels", f"the label is {label}, but {what} follows", i))
            break
    for start, end in pairwise(cu):
        if all(t == IGNORE_INDEX for t in batch.labels[start:end]):
            found.append(finding("nothing-trained", f"none of {end - start} tokens is trained", start))
    return found
