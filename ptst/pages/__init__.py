"""Reports as HTML pages: one self-contained file each, which needs no network and shows everything without scripts.

A page is a Jinja template that extends `base.html.jinja`, with a style and a script of the same name beside it. Text is
escaped, and what could command a terminal or turn the direction of writing is shown as U+....; the page's own policy
lets the browser run and apply nothing but this style and this script, by their sha256.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from ptst.progress import printable

_HERE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """The page that a template makes of `values`. `template`: its path, NAME.html.jinja, with NAME.css and NAME.js
    beside it. Any value may be hostile."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_block"] = json_block
    name = template.name.removesuffix(".html.jinja")
    style, script = (
        "".join((folder / f"{stem}.{kind}").read_text() for folder, stem in ((_HERE, "base"), (template.parent, name)))
        for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template.name).render(
        style=_own(style), script=_own(script), policy=_own(policy), **values
    )


def json_block(value: Any) -> Any:
    """A value as JSON for a block of data in a page: ASCII without a character that HTML knows."""
    text = json.dumps(value, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return _own(text)


def _own(text: str) -> Any:
    """Text of ours, which is HTML already."""
    from markupsafe import Markup

    return Markup(text)


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _source(text: str) -> str:
    """How a policy names one inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
