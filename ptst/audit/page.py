"""The audit as one HTML page: no network, legible without scripts or colour, in light and dark, on any width."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptst.audit.findings import VERDICTS, Finding
from ptst.audit.page_content import (
    after,
    characters,
    group,
    select,
    select_packs,
    show_packs,
    show_stretches,
    tables,
)
from ptst.audit.report import Audit
from ptst.audit.view import TokenView
from ptst.errors import Setting, UserError
from ptst.pages import render
from ptst.storage import write_atomically

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_page(report: Audit, path: Path) -> None:
    """Write the report as one HTML page. Raises UserError where that fails."""
    try:
        write_atomically(path, page(report).encode())
    except OSError as error:
        cause = (Setting("html"), f" {path} cannot be written ({error.strerror})")
        raise UserError(cause, "choose another path") from None


def page(report: Audit) -> str:
    """The whole page."""
    p = report.prompt_format
    every = _packs(report)
    findings, chosen = select(report.findings), select_packs(every)
    packs = show_packs(chosen, findings)
    stretches = list(show_stretches(report.comparison.aligned)) if report.comparison else []
    counts, count_tables = tables(report.counts)
    return render(
        TEMPLATE,
        title=f"Audit: {p.template.name} on {report.data}",
        verdict=VERDICTS[report.verdict],
        verdict_class="clean" if report.verdict == "info" else report.verdict,
        facts={
            "Model": report.model,
            "Data": report.data,
            "Training template": p.template.name,
            "Test template": report.test_template,
            "Chat format": p.format_name,
            "Family": p.family.name,
        },
        total=len(report.findings),
        groups=group(findings, report.found, packs),
        levels={level: n for level in ("error", "warning", "info") if (n := sum(f.level == level for f in findings))},
        findings_json=_compact(findings),
        pair=report.comparison,
        stretches=stretches,
        packs=packs,
        num_packs=len(every),
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


@dataclass(frozen=True)
class _Alone:
    """A row as a pack of its own."""

    documents: list[tuple[str, list[TokenView]]]
    step: int | None = None
    batch: Any = None


def _packs(report: Audit) -> Sequence[Any]:
    found = getattr(report, "packs", None)
    return [_Alone([row]) for row in report.rows] if found is None else found
