"""Counts of what reaches training."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ptst.data.packing import Batch
from ptst.data.sources import Source
from ptst.records import DataRecord


def tally(source: Source, batches: Sequence[Batch], prepared: DataRecord, micro_batch_tokens: int) -> dict[str, Any]:
    """Counts of what reaches training. Lengths in tokens."""
    lengths = [end - start for b in batches for start, end in pairwise(b.cu_seqlens)]
    capacity = sum(max(micro_batch_tokens, len(b.tokens)) for b in batches)
    return {
        **{k: v for k, v in prepared.result().items() if isinstance(v, int)},
        "shortest": min(lengths, default=0),
        "median_length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "trained_share": prepared.trained_tokens / sum(lengths) if lengths else 0.0,
        "micro_batch_tokens": micro_batch_tokens,
        "packing_fill": sum(lengths) / capacity if capacity else 0.0,
        "distinct_rows": len({c.messages for c in source.conversations}),
    }
