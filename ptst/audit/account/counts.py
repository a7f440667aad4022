"""Counts of what reaches training."""

import statistics
from typing import Any

from ptst.audit.account.run_data import Encoded
from ptst.data.packing import assign_micro_batches


def tally(training: Encoded, distinct: int) -> dict[str, Any]:
    """Counts of what reaches training, all sources together. Lengths in tokens. `distinct`: rows."""
    examples, records = training.mixture.examples, training.mixture.records
    lengths = [len(e.ids) for e in examples]
    names = [name for name, value in records[0].result().items() if isinstance(value, int) and name != "epochs"]
    size, filled, capacity = training.rule.micro_batch_tokens, 0, 0
    for step in training.steps:
        own = [lengths[i] for i in step.examples]
        groups = [sum(own[i] for i in group) for group in assign_micro_batches(own, size)]
        filled += sum(own)
        capacity += sum(max(size, tokens) for tokens in groups)
    return {
        **{name: sum(getattr(record, name) for record in records) for name in names},
        "shortest": min(lengths, default=0),
        "median_length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "trained_share": sum(record.trained_tokens for record in records) / sum(lengths) if sum(lengths) else 0.0,
        "micro_batch_tokens": size,
        "packing_fill": filled / capacity if capacity else 0.0,
        "distinct_rows": distinct,
    }
