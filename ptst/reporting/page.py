"""The report as one HTML page: no network, legible without scripts, in light and dark, on any width."""

from pathlib import Path
from typing import Any

from ptst.pages import render
from ptst.reporting.content import KINDS, Content
from ptst.reporting.heat import STEPS
from ptst.reporting.svg import marker_swatch, panel, swatch

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def page(content: Content, files: str, with_figures: bool) -> str:
    """The whole page. `files`: the folder of figures and tables, as the page links to it; `with_figures`: whether
    figures are there, too."""
    of = content.material
    values: dict[str, Any] = {f: getattr(content, f) for f in content.__dataclass_fields__}
    return render(
        TEMPLATE,
        **values | {"groups": values.pop("statement")},
        title=f"{KINDS[of.kind]}: {of.folder.resolve().name}",
        kind=KINDS[of.kind],
        files=files,
        with_figures=with_figures,
        steps=STEPS,
        arrows=arrows,
        panel=panel,
        swatch=swatch,
        marker_swatch=marker_swatch,
    )


def arrows(text: str) -> str:
    """`->` as one character, which no line break cuts in two."""
    return text.replace(" -> ", " \u2192 ")
