"""Draws docs/matrix.svg from docs/outcomes/laptop.json, and docs/audit.svg from one encoded conversation (for which it
needs the embedded model): `python benchmarks/pictures.py`. One hue, light to dark, so that every reader can tell them
apart. With the pages of a report and an audit, `python benchmarks/pictures.py REPORT.html AUDIT.html`, docs/report.png
and docs/audit-page.png instead: what headless Chromium shows of them."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from ptst.experiment.ladder.analysis import Study
from ptst.experiment.ladder.outcomes import ASR, Key, Outcomes
from ptst.experiment.ladder.registered import SAFE

DOCS = Path(__file__).resolve().parents[1] / "docs"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
STYLE = f"""<style>
  text {{ font-family: {FONT}; font-size: 14px; fill: #1f2328 }}
  .small {{ font-size: 12px; fill: #59636e }} .bold {{ font-weight: 700 }}
  .mono {{ font-family: {MONO}; font-size: 13px }}
  .page {{ fill: #ffffff }} .on-dark {{ fill: #ffffff }} .on-light {{ fill: #1f2328 }} .frame {{ stroke: #1f2328 }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3 }} .small {{ fill: #9198a1 }} .page {{ fill: #0d1117 }}
    .on-dark {{ fill: #ffffff }} .on-light {{ fill: #1f2328 }} .frame {{ stroke: #e6edf3 }}
  }}
</style>"""


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """A whole picture with its own background, so that it can be read on light and dark pages."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    page = f'<rect class="page" width="{width:g}" height="{height:g}" rx="6"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", STYLE, page, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}" xml:space="preserve">{escape(words)}</text>'
    )


def blue(share: float) -> tuple[str, str]:
    """Fill for a share from 0 to 1, light to dark, and the class of text that can be read on it."""
    light, dark = (0xEA, 0xF2, 0xFB), (0x08, 0x30, 0x6B)
    rgb = [round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)]
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})", "on-dark" if share > 0.6 else "on-light"


def matrix(study: Study) -> str:
    """The attack success rate for each pair of training and test template."""
    names = ("chat:vanilla", "chat:alpaca", "chat:llama")
    left, top, width, height = 190, 88, 150, 62
    parts = [
        text(16, 26, "Attack success rate: harmful requests complied with, %", "bold"),
        text(left, 54, "tested under", "small"),
        text(16, top - 10, "trained under", "small"),
        *(text(left + width * (j + 0.5), top - 10, name, "mono", "middle") for j, name in enumerate(names)),
    ]
    for i, train in enumerate(["", *names]):
        y = top + height * i
        parts.append(text(16, y + height / 2 + 5, train or "aligned model", "mono"))
        for j, test in enumerate(names):
            cell = study.shown(Key(study.data[0], train, "none", test, "safety"), ASR)
            fill, kind = blue(cell.mean)
            low, high = (f"{100 * x:.0f}" for x in cell.interval)
            x, middle = left + width * j, left + width * (j + 0.5)
            # PTST's own cells: trained without a safety prompt, tested with one.
            edge = ' class="frame" stroke-width="2.5"' if train not in ("", SAFE) and test == SAFE else ""
            box = f'x="{x + 2}" y="{y + 2}" width="{width - 4}" height="{height - 4}" rx="4"'
            parts.append(f'<rect {box} fill="{fill}"{edge}/>')
            parts.append(text(middle, y + 28, f"{100 * cell.mean:.1f}", f"{kind} bold", "middle"))
            n = f"[{low}, {high}]  n = {len(cell.runs)} x {len(study.outcomes.prompts['safety'].ids)}"
            parts.append(f'<text x="{middle:g}" y="{y + 47}" text-anchor="middle" class="{kind}" '
                         f'style="font-size: 11px">{n}</text>')  # fmt: skip
    y = top + height * (1 + len(names)) + 22
    notes = (
        "Mean over seeds, 95 % interval, n = seeds x requests. Framed: trained without a safety prompt,",
        "tested with one. SmolLM2-135M aligned by ptst.align, judge rules-v3; docs/laptop.md.",
    )
    parts += [text(16, y + 18 * i, note, "small") for i, note in enumerate(notes)]
    return svg(
        left + width * len(names) + 16, y + 32, "Attack success rate for each pair of training and test template", parts
    )


def audit(tokens: list[tuple[str, str, bool]]) -> str:
    """Tokens of one training example as (text, author, in the loss)."""
    shade = {"control": 0.0, "scaffold": 0.12, "system": 0.24, "user": 0.36, "assistant": 0.8}
    parts = [text(16, 26, "One training example under chat:vanilla, token by token", "bold")]
    x, y, size, wide = 16.0, 44.0, 7.9, 660
    for words, author, trained in tokens:
        width = size * len(words) + 8
        if x + width > wide - 16:
            x, y = 16.0, y + 44
        fill, kind = blue(shade[author])
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width - 2:g}" height="24" rx="3" fill="{fill}"/>')
        parts.append(text(x + width / 2 - 1, y + 17, words, f"mono {kind}", "middle"))
        if trained:
            parts.append(f'<line x1="{x:g}" x2="{x + width - 2:g}" y1="{y + 29:g}" y2="{y + 29:g}" class="frame" '
                         'stroke-width="3"/>')  # fmt: skip
        x += width
    x, y = 16.0, y + 52
    for author in dict.fromkeys(author for _, author, _ in tokens):
        fill, _ = blue(shade[author])
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="14" height="14" rx="3" fill="{fill}"/>')
        parts.append(text(x + 20, y + 12, author, "small"))
        x += 46 + 7 * len(author)
    parts.append(f'<line x1="{x:g}" x2="{x + 22:g}" y1="{y + 8:g}" y2="{y + 8:g}" class="frame" stroke-width="3"/>')
    parts.append(text(x + 30, y + 12, "in the loss", "small"))
    return svg(wide, y + 30, "One training example, token by token, with the tokens in the loss underlined", parts)


def example_tokens() -> list[tuple[str, str, bool]]:
    """A short problem as training encodes it for the embedded model."""
    from ptst.audit.setup import Setup
    from ptst.audit.view import view, visible
    from ptst.open import open_model
    from ptst.text.segments import Conversation, Message

    p = open_model("smollm2-135m-instruct", "chat:vanilla", family="gsm8k").prompt_format
    turns = Message("user", "Ann has 17 pens and buys 25. How many now?"), Message("assistant", "17 + 25 = 42\n#### 42")
    conversation = Conversation(turns)
    return [(visible(t.text), t.author, t.trained) for t in view(p.encode(conversation), conversation, Setup(p))]


def photograph(report: Path, audit_page: Path) -> None:
    """Pictures of the first screens of both pages."""
    from benchmarks.browser import Browser

    browser = Browser((1100, 1000))
    for page, name in ((report, "report.png"), (audit_page, "audit-page.png")):
        browser.open(page.resolve())
        browser.screenshot(DOCS / name)
    browser.close()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.path.insert(0, str(DOCS.parent))
        photograph(*map(Path, sys.argv[1:]))
        sys.exit()
    outcomes = Outcomes.read(DOCS / "outcomes" / "laptop.json")
    DOCS.joinpath("matrix.svg").write_text(matrix(Study.of(outcomes)))
    DOCS.joinpath("audit.svg").write_text(audit(example_tokens()))
