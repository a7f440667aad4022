"""The audit as one HTML page: no network, no scripts, legible in light and dark and without colour."""

from html import escape
from pathlib import Path

from ptst.audit.findings import RULES, VERDICTS, Finding
from ptst.audit.report import Audit
from ptst.audit.view import Comparison, TokenView, visible
from ptst.errors import Setting, UserError
from ptst.storage import write_atomically
from ptst.text.encode import first_difference

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1a1a;--soft:#666;--line:#ddd;--trained:#d9f2e0;--error:#b3261e;
--warning:#8a5a00;--info:#2b5fa8;--control:#7a2e8e;--system:#7d5a00;--user:#2b5fa8;--assistant:#1d6b3a}
@media (prefers-color-scheme:dark){:root{--bg:#16181b;--fg:#e6e6e6;--soft:#a0a0a0;--line:#3a3d42;--trained:#1f4a2e;
--error:#ff8a80;--warning:#ffc966;--info:#8ab8ff;--control:#d79bea;--system:#e5c07b;--user:#8ab8ff;--assistant:#8fdcab}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;
max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.rule{white-space:nowrap}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);
vertical-align:top}td.n{font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
.error{color:var(--error);font-weight:600}.warning{color:var(--warning);font-weight:600}
.info{color:var(--info)}
.row{font:14px/1.9 ui-monospace,monospace;overflow-wrap:anywhere;
border:1px solid var(--line);border-radius:6px;padding:.6rem}
.row span{border-radius:3px;padding:1px 0}.row span:hover{outline:2px solid var(--fg)}
.t{background:var(--trained);text-decoration:underline;text-underline-offset:4px}
.control{color:var(--control)}.system{color:var(--system)}.user{color:var(--user)}.assistant{color:var(--assistant)}
.scaffold{color:var(--soft)}.bad{outline:2px dashed var(--error)}.token-boundary{border-left:3px solid var(--warning)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:6px;padding:.6rem;margin:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}@media (max-width:50rem){.two{grid-template-columns:1fr}}
mark{background:var(--trained);color:inherit}
"""


def write_page(report: Audit, path: Path) -> None:
    """Write the report as one HTML page. Raises UserError where that fails."""
    try:
        write_atomically(path, page(report).encode(errors="backslashreplace"))
    except OSError as error:
        cause = (Setting("html"), f" {path} cannot be written ({error.strerror})")
        raise UserError(cause, "choose another path") from None


def page(report: Audit) -> str:
    """The whole page."""
    p, listed = report.prompt_format, report.listed
    title = f"Audit: {p.template.name} on {report.data}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p>Model {escape(report.model)}, chat format {escape(p.format_name)}, family {escape(p.family.name)}. "
        f"Verdict: <span class={report.verdict}>{VERDICTS[report.verdict]}</span>.</p>",
        "<h2>Findings</h2>",
        _findings(listed, report.found),
        "<h2>Tokens</h2><p>Underlined on a tinted background: trained. Dashed frame: a finding. Bar at the left: a "
        "token boundary. Hover over a token for its id, author, position and label. "
        + " ".join(f"<span class={a}>{a}</span>" for a in ("control", "scaffold", "system", "user", "assistant")),
    ]
    rules = {(f.row, f.token): f.rule for f in listed if f.token is not None and f.level != "info"}
    for row, tokens in report.rows:
        spans = "".join(_token(t, rules.get((row, t.index))) for t in tokens)
        parts.append(f"<h3>{escape(row)}</h3><div class=row>{spans}</div>")
    counts = {name: f"{n:.3f}" if isinstance(n, float) else n for name, n in report.counts.items()}
    parts += [
        _comparison(report.comparison),
        "<h2>Counts</h2><div class=wide><table>",
        *(f"<tr><td>{name.replace('_', ' ')}<td class=n>{number}" for name, number in counts.items()),
        "</table></div>",
    ]
    return "\n".join(parts) + "\n"


def _findings(findings: list[Finding], found: dict[str, int]) -> str:
    if not findings:
        return "<p>None.</p>"
    head = "<div class=wide><table><tr><th>level<th>rule<th>row<th>token<th>cause<th>what to do"
    body = "".join(
        f"<tr><td class={f.level}>{f.level}<td class=rule>{f.rule}<td>{escape(f.row)}<td class=n>"
        f"{'' if f.token is None else f.token}<td>{escape(f.cause)}<td>{escape(RULES[f.rule].remedy)}"
        for f in findings
    )
    more = sum(found.values()) - len(findings)
    return head + body + "</table></div>" + (f"<p>And {more} more: {escape(str(found))}</p>" if more else "")


def _comparison(pair: Comparison | None) -> str:
    if pair is None:
        return ""
    same = first_difference(pair.training, pair.prompt)
    training, prompt = (
        escape(text[:same]) + (f"<mark>{escape(text[same:])}</mark>" if text[same:] else "")
        for text in (pair.training, pair.prompt)
    )
    return (
        f"<h2>Training and test</h2><p>{escape(pair.row)}: {pair.described}.</p><div class=two><div><p>Training, "
        f"{escape(pair.train_template)}<pre>{training}</pre></div><div><p>Prompt at test time, "
        f"{escape(pair.test_template)}<pre>{prompt}</pre></div></div>"
    )


def _token(t: TokenView, rule: str | None) -> str:
    label = "none" if t.label is None else t.label
    states = {"trained": t.trained, "token boundary": t.token_boundary, rule or "": rule}
    details = [f"token {t.index}", f"id {t.id}", t.author, f"document {t.document}", f"position {t.position}"]
    details += [f"label {label}", *(state for state, on in states.items() if on)]
    classes = [t.author, *(["t"] * t.trained), *(["token-boundary"] * t.token_boundary), *(["bad"] if rule else [])]
    text = escape(visible(t.text)).replace("\u21b5", "\u21b5<wbr>")
    return f'<span class="{" ".join(classes)}" title="{escape(", ".join(details))}">{text}</span><wbr>'
