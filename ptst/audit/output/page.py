"""The audit as one HTML page: no network, legible without scripts or colour, in light and dark, on any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptst.audit.account.table import COLUMNS
from ptst.audit.findings import VERDICTS, Finding
from ptst.audit.output.page_content import (
    after,
    characters,
    group,
    select,
    select_packs,
    show_account,
    show_packs,
    show_stretches,
    tables,
)
from ptst.audit.report import Audit
from ptst.audit.view import TokenView
from ptst.errors import Setting, UserError
from ptst.pages import render
from ptst.storage import write_atomically

if TYPE_CHECKING:
    from ptst.audit.batches.audit import BatchesAudit

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_page(report: Audit | BatchesAudit, path: Path) -> None:
    """Write the report as one HTML page. Raises UserError where that fails."""
    try:
        write_atomically(path, page(report).encode())
    except OSError as error:
        cause = (Setting("html"), f" {path} cannot be written ({error.strerror})")
        raise UserError(cause, "choose another path") from None


def page(report: Audit | BatchesAudit) -> str:
    """The whole page."""
    p = report.prompt_format
    own = report if isinstance(report, Audit) else None
    every: Sequence[Any] = own.packs if own else [_Alone([row]) for row in report.rows]
    findings, chosen = select(report.findings), select_packs(every)
    packs = show_packs(chosen, findings)
    stretches = list(show_stretches(report.comparison.aligned)) if report.comparison else []
    counts, count_tables = tables(report.counts)
    return render(
        TEMPLATE,
        title=f"Audit: {p.template.name} on {report.data}",
        verdict=VERDICTS[report.verdict],
        verdict_class="clean" if report.verdict == "info" else report.verdict,
        facts=_facts(report),
        not_checked={} if isinstance(report, Audit) else report.not_checked,
        total=len(report.findings),
        groups=group(findings, report.found, packs),
        levels={level: n for level in ("error", "warning", "info") if (n := sum(f.level == level for f in findings))},
        findings_json=_compact(findings),
        pair=report.comparison,
        stretches=stretches,
        packs=packs,
        num_packs=len(every),
        account=show_account(own.account) if own else [],
        account_columns=COLUMNS,
        counts=counts,
        count_tables=count_tables,
        provenance=report.provenance,
        characters=characters,
        after=after,
    )


def _compact(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings as JSON has them, without the names of their fields and with each rule's words once."""
    of_rules = ("meaning", "remedy")
    values = [f.to_json() for f in findings]
    names = [name for name in (values[0] if values else ()) if name not in of_rules]
    return {
        "rules": {v["rule"]: {name: v[name] for name in of_rules} for v in values},
        "fields": names,
        "findings": [[v[name] for name in names] for v in values],
    }


def _facts(report: Audit | BatchesAudit) -> dict[str, str]:
    """What was audited, by name; what does not apply is left out."""
    p, own = report.prompt_format, report if isinstance(report, Audit) else None
    found = {
        "Model": report.model,
        "Data": report.data,
        "Messages": "" if isinstance(report, Audit) else report.messages,
        "Template": p.template.name,
        "Mixed in": "" if own is None else ", ".join(a.title for a in own.account if a.template),
        "Test template": report.test_template if isinstance(report, Audit) else "",
        "Chat format": p.format_name,
        "Family": p.family.name,
    }
    return {name: value for name, value in found.items() if value}


@dataclass(frozen=True)
class _Alone:
    """A document of which the micro-batch is not known."""

    documents: list[tuple[str, list[TokenView]]]
    step: int | None = None
    batch: Any = None
