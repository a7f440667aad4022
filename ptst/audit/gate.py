"""The audit inside training: no run starts, and no step is taken, on an error that is not allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ptst.audit.findings import RULES, Finding
from ptst.audit.report import check_data
from ptst.audit.rules import Setup, check_shape
from ptst.data.packing import Batch, pack
from ptst.data.sources import Source
from ptst.errors import Setting, UserError
from ptst.text.encode import Example


def refuse(findings: Iterable[Finding], allow: Iterable[str] = ()) -> None:
    """Raise UserError for the first finding of error level whose rule is not allowed."""
    allowed = set(allow)
    errors = [f for f in findings if f.level == "error" and f.rule not in allowed]
    if errors:
        first, more = errors[0], len(errors) - 1
        rest = f" ({more} more: python -m ptst.audit lists them)" if more else ""
        remedy = (f"{RULES[first.rule].remedy}, or allow it with ", Setting("allow"), f" {first.rule}{rest}")
        raise UserError(f"{first.rule}: {first.cause}", remedy, first.place)


def check_start(
    source: Source, examples: Sequence[Example], setup: Setup, micro_batch_tokens: int, allow: Iterable[str]
) -> list[str]:
    """Apply all rules to rows and batches before the first step; returns one line for each kind of warning.

    Raises UserError for an error that is not allowed.
    """
    findings = check_data(source, pack(examples, micro_batch_tokens), setup)
    refuse(findings, allow)
    warnings: dict[str, list[Finding]] = {}
    for f in findings:
        if f.level == "warning" and f.rule not in set(allow):
            warnings.setdefault(f.rule, []).append(f)
    return [
        f"warning: {RULES[rule].meaning} in {len(found)} places, the first at {found[0].row}: {found[0].cause}"
        for rule, found in warnings.items()
    ]


def watch(source: Source, allow: Iterable[str]) -> Callable[[Batch], None]:
    """The cheap rules as a check of every batch that training builds. What it returns raises UserError."""
    allowed = frozenset(allow)
    return lambda batch: refuse(check_shape(batch, source.conversations), allowed)
