"""The audit as one HTML page: no network, no scripts, legible in light and dark and without colour."""

from __future__ import annotations

from html import escape
from typing import Any

from ptst.audit.findings import RULES, Finding
from ptst.audit.view import TokenView, visible

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
.scaffold{color:var(--soft)}.bad{outline:2px dashed var(--error)}.token_boundary{border-left:3px solid var(--warning)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:6px;padding:.6rem;margin:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}@media (max-width:50rem){.two{grid-template-columns:1fr}}
mark{background:var(--trained);color:inherit}
"""


def page(report: dict[str, Any], findings: list[Finding], rows: list[tuple[str, list[TokenView]]]) -> str:
    """The whole page. `rows` are (place in the data, tokens)."""
    title = f"Audit: {report['template']} on {report['data']}"
    verdict = {"error": "errors found", "warning": "warnings found", "info": "clean"}[report["verdict"]]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p>Model {escape(report['model'])}, chat format {escape(report['chat_format'])}, family "
        f"{escape(report['family'])}. Verdict: <span class={report['verdict']}>{verdict}</span>.</p>",
        "<h2>Findings</h2>",
        _findings(findings, report["found"]),
        "<h2>Tokens</h2><p>Underlined on a tinted ground: trained. Dashed frame: a finding. Bar at the left: a token "
        "boundary. Hover over a token for its id, author, position and target. "
        + " ".join(f"<span class={a}>{a}</span>" for a in ("control", "scaffold", "system", "user", "assistant")),
    ]
    bad = {(f.row, f.token): f.rule for f in findings if f.token is not None and f.level != "info"}
    for place, tokens in rows:
        spans = "".join(_token(t, bad.get((place, t.index))) for t in tokens)
        parts.append(f"<h3>{escape(place)}</h3><div class=row>{spans}</div>")
    parts += [
        _comparison(report.get("comparison")),
        "<h2>Counts</h2><div class=wide><table>",
        *(f"<tr><td>{escape(_label(k))}<td class=n>{escape(_number(v))}" for k, v in report["counts"].items()),
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


def _comparison(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return ""
    told = (
        "the prompt is the beginning of the training sequence"
        if pair["same"] == pair["prompt_tokens"]
        else f"they part at token {pair['same']}"
    )
    length = _same(pair["training"], pair["prompt"])
    training, prompt = (_from(pair[side], length) for side in ("training", "prompt"))
    return (
        f"<h2>Training beside testing</h2><p>{escape(pair['row'])}: {told}.</p><div class=two><div><p>Training, "
        f"{escape(pair['train_template'])}<pre>{training}</pre></div><div><p>Prompt at test time, "
        f"{escape(pair['test_template'])}<pre>{prompt}</pre></div></div>"
    )


def _same(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _from(text: str, at: int) -> str:
    """Text marked from a character on."""
    return escape(text[:at]) + (f"<mark>{escape(text[at:])}</mark>" if text[at:] else "")


def _token(t: TokenView, rule: str | None) -> str:
    target = "nothing" if t.target is None else t.target
    told = f"token {t.index}, id {t.id}, {t.author}, document {t.document}, position {t.position}, predicts {target}"
    told += (
        (", trained" if t.trained else "")
        + (", token boundary" if t.token_boundary else "")
        + (f", {rule}" if rule else "")
    )
    classes = [
        t.author,
        *(["t"] if t.trained else []),
        *(["token-boundary"] if t.token_boundary else []),
        *(["bad"] if rule else []),
    ]
    text = escape(visible(t.text)).replace("\u21b5", "\u21b5<wbr>")
    return f'<span class="{" ".join(classes)}" title="{escape(told)}">{text}</span><wbr>'


def _label(key: str) -> str:
    return key.replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
