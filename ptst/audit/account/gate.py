"""Training's gate: no run starts and no step is taken on an error that is not allowed. Its verdict on data that were
checked before is remembered (`ptst.audit.account.verdicts`)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

from ptst.audit.account import verdicts
from ptst.audit.account.chunks import CHUNK, MANY, Prepared, check_part
from ptst.audit.account.tally import Tally
from ptst.audit.account.verdicts import Warning
from ptst.audit.findings import RULES, Finding
from ptst.audit.setup import Setup

__all__ = ["Prepared", "check_start", "refuse"]


def refuse(findings: Iterable[Finding], allow: Iterable[str] = ()) -> None:
    """Raise UserError for the first finding of error level whose rule is not allowed."""
    Tally(findings).refuse(allow)


def check_start(
    data: Sequence[Prepared],
    setup: Setup,
    micro_batch_tokens: int,
    allow: Iterable[str],
    key: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> list[str]:
    """Apply all rules to rows and batches before the first step; returns one line for each kind of warning. Raises
    UserError for an error that is not allowed. `key`: of all that the verdict depends on, under which it is remembered;
    `say` gets a line where it was."""
    allowed, rows = set(allow), sum(len(part.source.conversations) for part in data)
    with verdicts.one_at_a_time(key) if key and rows >= MANY * CHUNK else nullcontext():
        warnings = None if key is None else verdicts.recall(key)
        if warnings is None:
            found = Tally()
            for part in data:
                found.merge(check_part(part, setup, micro_batch_tokens))
            found.refuse(allowed)
            warnings = [Warning(f.rule, number, f.row, f.cause) for number, f in found.of_level("warning")]
            if key is not None and not found.of_level("error"):
                verdicts.remember(key, warnings)
        else:
            say(f"the audit of these {rows} rows is remembered from an earlier run of the same settings and version")
    return [
        f"warning: {RULES[w.rule].meaning} in {w.number} places, the first at {w.row}: {w.cause}"
        for w in warnings
        if w.rule not in allowed
    ]
