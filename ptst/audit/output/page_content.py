"""What the audit's page shows, in the order and the pieces that its template wants."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ptst.audit.account.table import COLUMNS, SourceAccount
from ptst.audit.findings import LEVELS, RULES, Finding
from ptst.audit.output.alignment import Stretch
from ptst.audit.view import TokenView, visible

MAX_FINDINGS = 10_000  # on the page; all are counted, and the JSON report has them
MAX_TOKENS = 20_000  # shown one by one
_EQUAL = 12  # tokens at either end of a long stretch that both sequences have; those between are folded
_KINDS = {  # sign, words
    "same": ("=", "in both"),
    "training": ("\u2212", "only in training"),
    "test": ("+", "only at test time"),
    "answer": ("\u2193", "the answer, only in training: at test time the model samples it"),
}


@dataclass(frozen=True)
class PageToken:
    """A token of a document that is shown. `key`: its anchor. `numbers`, `rules` and highest `level` ("" for none) are
    those of the findings at it."""

    key: str
    number: int
    view: TokenView
    numbers: list[int]
    rules: list[str]
    level: str

    @property
    def classes(self) -> str:
        v = self.view
        found = {"trained": v.trained, "boundary": v.token_boundary, "part": not v.text}
        found |= {"found": self.level in ("error", "warning"), "noted": self.level == "info"}
        return " ".join(("t", *(name for name, on in found.items() if on)))

    @property
    def details(self) -> str:
        """All that is known of it, in words."""
        v = self.view
        label = "no label" if v.label is None else f"label {v.label}"
        words = [f"token {self.number}", f"id {v.id}", v.author, f"document {v.document}", f"position {v.position}"]
        words += [label, "trained" if v.trained else "not trained"]
        words += ["token boundary"] * v.token_boundary + ["part of the character before it"] * (not v.text)
        return ", ".join([*words, *dict.fromkeys(self.rules)])


@dataclass(frozen=True)
class PageDocument:
    """A document that is shown: its runs of tokens by author. `numbers`: the findings in it."""

    key: str
    row: str
    runs: list[tuple[str, list[PageToken]]]
    numbers: list[int]

    @property
    def tokens(self) -> list[PageToken]:
        return [t for _, run in self.runs for t in run]

    @property
    def num_trained(self) -> int:
        return sum(t.view.trained for t in self.tokens)


@dataclass(frozen=True)
class PagePack:
    """A micro-batch that is shown: its step (None where none takes it), boundaries (none where its document is shown
    alone) and documents."""

    step: int | None
    cu_seqlens: list[int]
    documents: list[PageDocument]


@dataclass(frozen=True)
class PageFinding:
    number: int
    finding: Finding
    link: str


@dataclass(frozen=True)
class RuleGroup:
    """The findings of one rule. `total` counts those, too, that are not on the page."""

    rule: str
    level: str
    meaning: str
    remedy: str
    total: int
    findings: list[PageFinding]


@dataclass(frozen=True)
class PageStretch:
    """A stretch of the aligned sequences as (id, text) of its tokens: the `first`, those that are `folded`, and the
    `last`."""

    kind: str
    sign: str
    words: str
    places: str
    first: list[tuple[int, str]]
    folded: list[tuple[int, str]]
    last: list[tuple[int, str]]


def select(findings: Sequence[Finding], limit: int = MAX_FINDINGS) -> list[Finding]:
    """The findings for the page, most severe first: all, or as many of each rule as leave room for every other."""
    totals = Counter(f.rule for f in findings)
    room, left = dict[str, int](), limit
    for n, (rule, total) in enumerate(sorted(totals.items(), key=lambda item: item[1])):
        room[rule] = min(total, left // (len(totals) - n))
        left -= room[rule]
    out: list[Finding] = []
    for f in sorted(findings, key=lambda f: -LEVELS.index(f.level)):
        if room[f.rule]:
            room[f.rule] -= 1
            out.append(f)
    return out


def select_packs(packs: Sequence[Any], limit: int = MAX_TOKENS) -> list[Any]:
    """The first packs, whole, up to about `limit` tokens; always one."""
    out: list[Any] = []
    for pack in packs:
        limit -= sum(len(tokens) for _, tokens in pack.documents)
        if out and limit < 0:
            break
        out.append(pack)
    return out


def show_packs(packs: Sequence[Any], findings: Sequence[Finding]) -> list[PagePack]:
    """Packs with their documents; the findings in a row are marked where the row is shown first."""
    shown = {row for pack in packs for row, _ in pack.documents}
    by_row: dict[str, list[tuple[int, Finding]]] = {}
    for number, f in enumerate(findings):
        row = f.row if f.row in shown else f.row.rpartition(" (")[0]  # a batch's document, with its message
        by_row.setdefault(row, []).append((number, f))
    out, count = list[PagePack](), 0
    for pack in packs:
        documents = []
        for row, tokens in pack.documents:
            documents.append(_document(f"d{count}", row, tokens, by_row.pop(row, [])))
            count += 1
        bounds = list(pack.batch.cu_seqlens) if pack.batch is not None else []
        out.append(PagePack(pack.step, bounds, documents))
    return out


def _document(key: str, row: str, tokens: Sequence[TokenView], found: list[tuple[int, Finding]]) -> PageDocument:
    at: dict[int | None, list[tuple[int, Finding]]] = {}
    for number, f in found:
        at.setdefault(f.token, []).append((number, f))
    shown = []
    for n, token in enumerate(tokens):
        here = at.get(n, [])
        level = max((f.level for _, f in here), key=LEVELS.index, default="")
        numbers, rules = [number for number, _ in here], [f.rule for _, f in here]
        shown.append(PageToken(f"{key}-t{n}", n, token, numbers, rules, level))
    runs = [(author, list(run)) for author, run in groupby(shown, lambda t: t.view.author)]
    return PageDocument(key, row, runs, [number for number, _ in found])


def group(findings: Sequence[Finding], totals: Mapping[str, int], packs: Sequence[PagePack]) -> list[RuleGroup]:
    """The findings by rule, each with a link to its token, or to its row, where that is shown."""
    links: dict[int, str] = {}
    for document in (d for pack in packs for d in pack.documents):
        links |= dict.fromkeys(document.numbers, document.key)
        links |= {number: t.key for t in document.tokens for number in t.numbers}
    groups: dict[tuple[str, str], list[PageFinding]] = {}
    for number, f in enumerate(findings):
        groups.setdefault((f.rule, f.level), []).append(PageFinding(number, f, links.get(number, "")))
    return [
        RuleGroup(rule, level, RULES[rule].meaning, RULES[rule].remedy, totals[rule], found)
        for (rule, level), found in groups.items()
    ]


def show_stretches(stretches: Sequence[Stretch]) -> Iterator[PageStretch]:
    """The aligned sequences, long stretches that both have folded in the middle."""
    for s in stretches:
        tokens = list(zip(s.ids, s.texts, strict=True))
        fold = s.kind == "same" and len(tokens) > 3 * _EQUAL
        first, last = (tokens[:_EQUAL], tokens[-_EQUAL:]) if fold else (tokens, [])
        sides = {"training": s.kind != "test", "test": s.kind in ("same", "test")}
        starts = {"training": s.training, "test": s.test}
        places = ", ".join(f"{side} {_span(starts[side], len(tokens))}" for side, on in sides.items() if on)
        folded = tokens[_EQUAL:-_EQUAL] if fold else []
        yield PageStretch(s.kind, *_KINDS[s.kind], places, first, folded, last)


def _span(start: int, size: int) -> str:
    return f"{start}" if size == 1 else f"{start} to {start + size - 1}"


def show_account(accounts: Sequence[SourceAccount]) -> list[tuple[str, list[str]]]:
    """(source, its numbers) as `account.COLUMNS` names them."""
    return [
        (
            account.title,
            ["" if (v := getattr(account, name)) is None else f"{v:g}" for name in COLUMNS],
        )
        for account in accounts
    ]


def tables(values: Mapping[str, Any]) -> tuple[dict[str, str], list[tuple[str, list[str], list[list[str]]]]]:
    """Counts as the page shows them: single values by name, and (name, columns, rows) of those that are tables: lists
    of entries, or entries by name."""
    single, found = dict[str, str](), list[tuple[str, list[str], list[list[str]]]]()
    for name, value in values.items():
        rows: Any = value
        if isinstance(value, Mapping):
            nested = all(isinstance(entry, Mapping) for entry in value.values())
            rows = [{name: key, **(entry if nested else {"value": entry})} for key, entry in value.items()]
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            cells = [[_words(row.get(column, "")) for column in columns] for row in rows]
            found.append((name.replace("_", " "), [c.replace("_", " ") for c in columns], cells))
        else:
            single[name.replace("_", " ")] = _words(value)
    return single, found


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(_words, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def characters(text: str) -> Any:
    """A token's text with signs for what is invisible, and a break where the text goes on in another line."""
    from markupsafe import Markup, escape

    return Markup(str(escape(visible(text))).replace("\u21b5", "\u21b5<br>").removesuffix("<br>")) if text else "\u25e6"


def after(text: str) -> Any:
    """What comes after a token: a break where its text ends in one, else a place where a line may be broken."""
    from markupsafe import Markup

    return Markup("<br>" if text.endswith("\n") else "<wbr>")
