"""The audit inside training: no run starts, and no step is taken, on an error that is not allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ptst.audit.corpus import check_rows
from ptst.audit.findings import RULES, Finding
from ptst.audit.rules import Setup, check_batch, check_shape
from ptst.data.packing import Batch, pack
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.encode import Example


def refuse(findings: Iterable[Finding], allow: Iterable[str] = ()) -> None:
    """Raise UserError for the first finding of error level whose rule is not allowed."""
    errors = [f for f in findings if f.level == "error" and f.rule not in set(allow)]
    if errors:
        first, more = errors[0], len(errors) - 1
        rest = f" ({more} more: python -m ptst.audit shows them)" if more else ""
        raise UserError(f"{first}; or allow it with --allow {first.rule}{rest}")


def check_start(
    source: Source, examples: Sequence[Example], setup: Setup, micro_batch_tokens: int, allow: Iterable[str]
) -> list[str]:
    """All rules on rows and batches before the first step; a line to say for each kind of warning.

    Raises UserError for an error that is not allowed.
    """
    findings = [*check_rows(source.conversations, setup.prompt_format)]
    for batch in pack(examples, micro_batch_tokens):
        findings += check_batch(batch, source.conversations, setup)
    refuse(findings, allow)
    first: dict[str, Finding] = {}
    number: dict[str, int] = {}
    for f in findings:
        if f.level == "warning" and f.rule not in set(allow):
            first.setdefault(f.rule, f)
            number[f.rule] = number.get(f.rule, 0) + 1
    return [
        f"warning: {RULES[rule].meaning} in {number[rule]} places, the first at {f.row}: {f.cause}"
        for rule, f in first.items()
    ]


def watch(source: Source, allow: Iterable[str]) -> Callable[[Batch], None]:
    """The cheap rules on every batch that training builds. What it returns raises UserError."""
    allowed = frozenset(allow)
    return lambda batch: refuse(check_shape(batch, source.conversations), allowed)
