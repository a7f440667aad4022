"""The audit's page: everything is on it, linked, legible without scripts; nothing in data breaks out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import ptst.audit.output.page as audit_page
import ptst.pages
from ptst.audit.account.batch_checks import Pack
from ptst.audit.account.table import COLUMNS
from ptst.audit.config import AuditConfig
from ptst.audit.findings import Finding
from ptst.audit.output.alignment import Stretch
from ptst.audit.output.page import page
from ptst.audit.output.page_content import MAX_FINDINGS, select, select_packs, show_stretches, tables
from ptst.audit.report import audit_data
from ptst.data.packing import to_batch
from tests.tiny import write_tiny_model

PAGES, AUDIT = Path(ptst.pages.__file__).parent, Path(audit_page.__file__).parent
VOID = {"meta", "link", "br", "wbr", "input", "hr", "img"}
UNCLOSED = {"td", "th", "tr", "li", "dt", "dd", "p"}  # HTML lets their end tags be left out
HOSTILE = "</script><script>hack()</script><img src=x onerror=hack()>\x1b]0;t\x07\u202e\u2028\ud800&lt;\"'`{{60007*7}}"
SHOWN = "".join(f"U+{ord(c):04X}" if c in "\x1b\x07\u202e\u2028\ud800" else c for c in HOSTILE)


class Page(HTMLParser):
    """A page as a browser without scripts has it: elements in order, with the text in each and the elements around."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(html)
        self.close()
        assert [e["tag"] for e in self.open] == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"twice: {attrs}"
        while tag in ("td", "th", "tr") and self.open[-1]["tag"] in ("td", "th"):
            self.open.pop()
        element = {"tag": tag, "text": "", "attrs": dict(attrs), "within": [*self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open[-1]["tag"] != tag:
            assert self.open.pop()["tag"] in UNCLOSED, tag
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag=None, **attrs):
        """Elements by tag and attributes; `cls`: one of the classes."""
        cls = attrs.pop("cls", None)
        return [
            e
            for e in self.elements
            if tag in (None, e["tag"])
            and (cls is None or cls in (e["attrs"].get("class") or "").split())
            and all(e["attrs"].get(k) == v for k, v in attrs.items())
        ]

    def one(self, tag=None, **attrs):
        (found,) = self.all(tag, **attrs)
        return found


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [("2 + 3?\nWhy?", "5\n\nfive"), ("na\u00efve \U0001f600?", "yes"), ("what?", " ")]
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in turns))
    return audit_data(AuditConfig(model=str(tiny), data=str(data), test_template="chat:llama", rows=3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def marked(report):
    """With findings at a token, in a row, in a row that is not shown, and in none."""
    row, tokens = report.packs[0].documents[0]
    token = next(n for n, t in enumerate(tokens) if t.trained)
    more = [
        Finding("labels", row, "the label is the token itself", token, expected="id 7", seen="id 8"),
        Finding("blank-prompt", row, "blank"),
        Finding("overlap", "elsewhere.jsonl:7", "asked", 3),
        Finding("cut", "", "3 of 9 rows"),
    ]
    return replace(report, findings=[*more, *report.findings])


def test_findings_are_linked_to_rows_and_tokens(marked):
    found = Page(page(marked))
    row, tokens = marked.packs[0].documents[0]
    items = [found.one("li", id=f"f{n}") for n in range(len(marked.findings))]
    for item, finding in zip(items, select(marked.findings), strict=True):
        assert finding.cause in item["text"] and finding.place in item["text"]
    hrefs = {e["text"]: e["attrs"]["href"] for e in found.all("a") if any(item in e["within"] for item in items)}
    finding = marked.findings[0]
    target = found.one(id=hrefs[finding.place][1:])
    assert target["attrs"]["title"].startswith(f"token {finding.token}, id {tokens[finding.token].id}, ")
    assert "trained" in target["attrs"]["class"].split() and "found" in target["attrs"]["class"].split()
    assert target["attrs"]["title"].endswith(", labels")
    assert found.one(id=hrefs[row][1:])["text"].count(row) == 1
    assert "elsewhere.jsonl:7, token 3" not in hrefs
    assert "id 7" in items[0]["text"] and "id 8" in items[0]["text"]
    ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
    assert max(Counter(ids).values()) == 1
    assert {e["attrs"]["href"][1:] for e in found.all("a")} <= set(ids)
    for token in found.all("span", cls="t"):  # from a token to its findings
        assert all(f"f{n}" in ids for n in token["attrs"].get("data-findings", "").split())


def test_every_token_is_there_with_its_details(marked):
    found = Page(page(marked))
    documents = found.all("section", cls="document")
    every = [d for pack in marked.packs for d in pack.documents]
    assert [d["attrs"]["id"] for d in documents] == [f"d{n}" for n in range(len(every))]
    assert len(every) == 3 and len(marked.packs) == 1  # all in one micro-batch, and shown so
    bounds = " ".join(map(str, marked.packs[0].batch.cu_seqlens))
    (pack,) = found.all("section", cls="pack")
    assert "micro-batch of 3 documents" in pack["text"] and f"(cu_seqlens): {bounds}" in pack["text"]
    for n, (row, tokens) in enumerate(every):
        assert row in documents[n]["text"]
        for i, t in enumerate(tokens):
            element = found.one(id=f"d{n}-t{i}")
            details = element["attrs"]["title"]
            assert f"id {t.id}, {t.author}, document {t.document}, position {t.position}, " in details
            assert ("no label" if t.label is None else f"label {t.label}") in details
            assert (", trained" in details) == t.trained == ("trained" in element["attrs"]["class"].split())
            assert element["within"][-1]["attrs"]["class"] == f"run {t.author}"
    cells = [e["text"].strip() for e in found.all("td", **{"data-name": "id"})]
    assert cells == [str(t.id) for _, tokens in every for t in tokens]  # the same as tables


def test_training_and_test_are_aligned(report):
    found = Page(page(report))
    rows = [e for e in found.all("tr") if e["attrs"].get("class")]
    kinds = [e["attrs"]["class"] for e in rows]
    assert kinds == [s.kind for s in report.comparison.aligned]
    assert {"same", "test", "answer"} <= set(kinds)
    by_kind = {"same": "in both", "test": "only at test time", "answer": "the answer", "training": "only in training"}
    for row, stretch in zip(rows, report.comparison.aligned, strict=True):
        assert by_kind[stretch.kind] in row["text"]
        shown = [e for e in found.all("span", cls="k") if row in e["within"]]
        assert [e["attrs"]["title"] for e in shown] == [f"id {i}" for i in stretch.ids]
        empty = [e for e in found.all("td", cls="none") if row in e["within"]]
        assert len(empty) == (stretch.kind != "same")


def test_long_stretches_that_both_have_are_folded():
    for kind in ("same", "test"):
        (found,) = show_stretches([Stretch(kind, 4, 5, list(range(100)), ["a"] * 100)])
        assert [i for part in (found.first, found.folded, found.last) for i, _ in part] == list(range(100))
        assert bool(found.folded) == (kind == "same")
    assert found.places == "test 5 to 104"


def test_the_report_names_what_it_read(marked):
    text = Page(page(marked)).one("section", id="provenance")["text"]
    for value in (marked.provenance["date"], *marked.provenance["fingerprints"].values(), "tokenizer.json", "ptst"):
        assert value in text


def test_the_account_of_every_source(marked):
    found = Page(page(marked))
    (source,) = marked.account
    section = found.one("section", id="account")
    (name,) = [e["text"] for e in found.all("th", scope="row") if section in e["within"]]
    assert name == source.name
    cells = {e["attrs"]["data-name"]: e["text"] for e in found.all("td") if section in e["within"]}
    assert cells == {c: "" if (v := getattr(source, c)) is None else f"{v:g}" for c in COLUMNS}
    assert all(words in section["text"] for words in COLUMNS.values())


def test_counts_that_are_tables():
    single, found = tables(
        {
            "fill": 0.5,
            "account": {"a.jsonl": {"read": 3, "in_steps": 2}, "b.jsonl": {"read": 1, "cut": 1}},
            "none": None,
        }
    )
    assert single == {"fill": "0.500", "none": ""}
    assert found == [
        ("account", ["account", "read", "in steps", "cut"], [["a.jsonl", "3", "2", ""], ["b.jsonl", "1", "", "1"]])
    ]
    assert tables({"steps": [{"step": 1, "rows": [1, 2]}]})[1] == [("steps", ["step", "rows"], [["1", "1, 2"]])]


@pytest.fixture(scope="module")
def hostile(tiny, tmp_path_factory):
    """Everything that a user or a stranger may name is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "<script>hack()<\x7f\u202e&.jsonl".replace("/", "")
    text = HOSTILE.replace("\ud800", "")
    rows = [{"question": f"q {text}", "answer": f"a {text}"}, {HOSTILE: 1}, {"question": HOSTILE, "answer": "a"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = audit_data(AuditConfig(model=str(tiny), data=str(data), test_template="chat:llama", rows=9))
    row, tokens = report.packs[0].documents[0]
    planted = [Finding("labels", row, HOSTILE, 2, expected=HOSTILE, seen=HOSTILE), Finding("cut", HOSTILE, HOSTILE)]
    pair = replace(report.comparison, row=HOSTILE, train_template=HOSTILE)
    counts = report.counts | {HOSTILE: HOSTILE, "t": {HOSTILE: {HOSTILE: HOSTILE}}}
    tokens = [*tokens, replace(tokens[-1], text=HOSTILE, author="user", index=len(tokens))]
    provenance = {**report.provenance, "settings": {HOSTILE: HOSTILE}, "git_commit": HOSTILE}
    return replace(
        report,
        model=HOSTILE,
        findings=[*planted, *report.findings],
        comparison=pair,
        counts=counts,
        packs=[replace(report.packs[0], documents=[(row, tokens), *report.packs[0].documents[1:]])],
        provenance=provenance,
    )


def test_hostile_text_stays_text(hostile):
    html = page(hostile)
    assert not [c for c in html if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\ud800")]
    found = Page(html)
    assert [e["attrs"].get("type") for e in found.all("script")] == ["application/json", None]
    assert found.all("img") == []
    for element in found.elements:
        assert not [name for name in element["attrs"] if name.startswith("on") or name in ("src", "style")]
        assert element["attrs"].get("href", "#")[0] == "#"
    assert len(found.all("style")) == 1
    assert found.all("script")[1]["text"] == (PAGES / "base.js").read_text() + (AUDIT / "page.js").read_text()
    text = found.one("main")["text"]
    assert text.count(SHOWN) >= 10  # model, findings, counts, settings
    assert "420049" not in text  # no template in data is evaluated
    data = json.loads(found.one(id="findings-data")["text"])
    copied = [dict(zip(data["fields"], values, strict=True)) for values in data["findings"]]
    assert [f | data["rules"][f["rule"]] for f in copied] == [f.to_json() for f in select(hostile.findings)]
    assert copied[0]["cause"] == HOSTILE


def test_the_policy_allows_this_style_and_this_script_alone(report):
    found = Page(page(report))
    policy = found.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["attrs"]["content"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    hashes = {
        f"{tag}-src": base64.b64encode(hashlib.sha256(element["text"].encode()).digest()).decode()
        for tag, element in (("style", found.one("style")), ("script", found.all("script")[1]))
    }
    assert rules["default-src"] == "'none'"
    assert {name: f"'sha256-{value}'" for name, value in hashes.items()}.items() <= rules.items()


def test_scripts_write_text_alone_and_fetch_nothing():
    for path in (PAGES / "base.js", AUDIT / "page.js"):
        code = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import"):
            assert word not in code, (path, word)


def test_everything_can_be_read_without_scripts(marked):
    """What needs them is marked, so that it is not shown in vain; the rest is shown by HTML and style alone."""
    found = Page(page(marked))
    inputs = [e for tag in ("input", "button") for e in found.all(tag)]
    for element in inputs:
        assert any("scripted-only" in (e["attrs"].get("class") or "") for e in element["within"])
    assert not [e for e in found.elements if "hidden" in e["attrs"] and e["attrs"].get("id") != "panel"]
    assert "html:not(.scripted) .scripted-only" in found.one("style")["text"]


def test_the_structure_tells_a_screen_reader(marked):
    found = Page(page(marked))
    assert found.one("html")["attrs"]["lang"] == "en"
    assert found.one("title")["text"].startswith("Audit: chat:vanilla on ")
    levels = [int(e["tag"][1]) for e in found.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    assert all(e["attrs"].get("scope") in ("col", "row") for e in found.all("th"))
    labelled = {e["attrs"]["for"] for e in found.all("label") if "for" in e["attrs"]}
    for element in found.all("input"):
        within = any(e["tag"] == "label" for e in element["within"])
        assert within or element["attrs"]["id"] in labelled
    for element in found.all("button"):
        assert element["text"].strip().isascii() or "aria-label" in element["attrs"]


def _colours(css: str) -> list[dict[str, str]]:
    """The variables in light and in dark."""
    block = r"@media \(prefers-color-scheme: dark\) \{(.*?)\n\}"
    light, dark = re.sub(block, "", css, flags=re.S), "".join(re.findall(block, css, re.S))
    by_mode = [dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for text in (light, dark)]
    return [by_mode[0], by_mode[0] | by_mode[1]]


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXTS = ("text", "soft", "link", "error", "warning", "info", "good")
AUTHORS = ("control", "scaffold", "system", "user", "assistant")


def test_contrast_in_light_and_dark():
    """WCAG 2.2, AA: 4.5 for text, 3 for frames."""
    css = "".join(path.read_text() for path in (PAGES / "base.css", AUDIT / "page.css"))
    pairs = [(text, back, 4.5) for text in TEXTS for back in ("page", "raised")]
    pairs += [(author, back, 4.5) for author in AUTHORS for back in ("page", "tint", "hit")]
    pairs += [(text, back, 4.5) for text in ("text", "soft") for back in ("left", "right", "tint", "hit")]
    pairs += [("frame", back, 3.0) for back in ("page", "raised")]
    modes = _colours(css)
    assert modes[0]["page"] != modes[1]["page"]
    low = {}
    for mode, colours in zip(("light", "dark"), modes, strict=True):
        assert len({colours[name] for name in ("left", "right", "tint", "page")}) == 4
        for text, back, least in pairs:
            a, b = sorted((_luminance(colours[text]), _luminance(colours[back])))
            if (ratio := (b + 0.05) / (a + 0.05)) < least:
                low[mode, text, back] = round(ratio, 2)
    assert low == {}


def test_many_findings_leave_room_for_every_rule(report):
    rules = ("labels", "prompt-trained", "blank-answer", "cut")
    rule = [rules[i] if i < 2 else rules[2 + i % 2] for i in range(40)]  # two of few findings, two of many
    many = [Finding(rule[i % 40], f"rows.jsonl:{i}", f"cause {i}", i) for i in range(4 * MAX_FINDINGS)]
    chosen = select(many)
    assert Counter(f.rule for f in chosen) == dict(zip(rules, (1000, 1000, 4000, 4000), strict=True))
    counts = Counter(f.rule for f in many)
    assert [f.level for f in chosen] == sorted((f.level for f in chosen), key=("error", "warning", "info").index)
    start = time.process_time()
    html = page(replace(report, findings=many))
    assert time.process_time() - start < 10
    assert len(html) < 6e6
    assert f"({len(many)})</a>" in html and f"of {counts['cut']};" in html
    assert select(many[:7]) == sorted(many[:7], key=lambda f: ("error", "warning", "info").index(f.level))


def test_packs_are_shown_whole():
    packs = [Pack(1, to_batch([]), [("r", [None] * n) for n in sizes]) for sizes in ((30, 30), (30,), (30,), (1,))]
    assert select_packs(packs, 90) == packs[:2]
    assert select_packs(packs, 10) == packs[:1]
    assert select_packs(packs, 10**6) == packs


@pytest.mark.thorough
def test_a_browser_runs_the_pages_script_and_no_other(hostile, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    path = tmp_path / "page.html"
    # What gets through would leave its mark.
    path.write_text(page(hostile).replace("hack()", "document.documentElement.lang='hacked'"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    done = subprocess.run([browser, *flags, f"{path.as_uri()}#d0-t2"], capture_output=True, text=True, timeout=120)
    assert '<html lang="en" class="scripted">' in done.stdout, done.stderr[-500:]
    found = Page(done.stdout)
    token = found.one("span", id="d0-t2", tabindex="0", cls="chosen")
    assert found.one(id="panel-details")["text"] == token["attrs"]["title"]
    assert [e["attrs"]["href"] for e in found.all("a") if found.one(id="panel") in e["within"]] == ["#f0"]
