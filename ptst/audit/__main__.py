"""`python -m ptst.audit`: every token that training would hand to the loss, its author, its label, and what is wrong.

    python -m ptst.audit --template vanilla --test-template chat:llama

Exit code: 0 only notes, 1 warnings or errors, 2 wrong usage.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ptst import cli
from ptst.audit.config import AuditConfig

if TYPE_CHECKING:
    from ptst.audit.batches.audit import BatchesAudit
    from ptst.audit.report import Audit

COLOURS = {"error": "red", "warning": "yellow", "info": "blue"}


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """Audit, print or write the report, and return it as JSON values. Raises UserError for a user's mistakes."""
    from ptst.audit.output.page import write_page
    from ptst.audit.output.summary import write_files

    if config.batches is not None:
        from ptst.audit.batches.audit import audit_batches
        from ptst.progress import printable

        batches = audit_batches(config)
        if config.html is not None:
            write_page(batches, config.html)
        write_files(batches, config.junit, config.sarif)
        if not config.json:
            print_report(batches)
            for name, why in batches.not_checked.items():
                print(f"not checked: {printable(name)}: {printable(why)}")
        return batches.to_json()
    from ptst.audit.report import audit_data

    report = audit_data(config)
    if config.html is not None:
        write_page(report, config.html)
    write_files(report, config.junit, config.sarif)
    if not config.json:
        print_report(report)
    return report.to_json()


def print_report(report: Audit | BatchesAudit) -> None:
    """The report on a terminal, which nothing in it commands."""
    from ptst.audit.account.table import account_table
    from ptst.audit.findings import VERDICTS
    from ptst.audit.output.page_content import MAX_TOKENS
    from ptst.audit.view import table
    from ptst.progress import open_console

    out, listed = open_console(), report.listed
    rows = report.rows
    room = accumulate((len(tokens) for _, tokens in rows), initial=0)  # taken by the rows before
    shown = max(1, sum(before + len(tokens) <= MAX_TOKENS for before, (_, tokens) in zip(room, rows, strict=False)))
    for row, tokens in rows[:shown]:
        found = [f for f in report.findings if f.row == row and f.level != "info"]
        marked = {f.token: f.rule for f in found if f.token is not None}
        out.print(table(tokens, row, marked))
        out.print()
    if left := len(rows) - shown:
        out.print(f"the tokens of {left} more rows are not printed: --json has them\n")
    if pair := report.comparison:
        out.print(f"{pair.row} in training, {pair.train_template}:")
        out.print(pair.training, style="dim")
        out.print(f"its prompt at test time, {pair.test_template}:")
        out.print(pair.prompt, style="dim")
        out.print(f"{pair.described}\n")
    for key, value in report.counts.items():
        out.print(f"{key:>16}  {value:.3f}" if isinstance(value, float) else f"{key:>16}  {value}")
    out.print()
    if account := getattr(report, "account", None):  # not of batches from outside
        out.print(account_table(account))
        out.print()
    for finding in listed:
        out.print(str(finding), style=COLOURS[finding.level], soft_wrap=True)
    for rule, number in report.found.items():
        if number > (shown := sum(f.rule == rule for f in listed)):
            out.print(f"{rule}: {number} in total, the first {shown} listed")
    out.print(f"verdict: {VERDICTS[report.verdict]}", style=f"bold {COLOURS[report.verdict]}")


def main() -> None:
    report = cli.run(run_audit, AuditConfig, "audit")
    sys.exit(0 if report is None or report["verdict"] == "info" else 1)


if __name__ == "__main__":
    main()
