"""The results as a table and as sentences: "who trains what".

A result is one (peer, setting, folder, corpus); `measure` makes it of the batches, `table` and `facts` word many.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .facts import PARTS, Parts, Speller, documents, take_apart

PLAIN = ("single", "turns", "system", "edges")  # corpora that nothing is cut in and that spell no markers
ALL = 9  # folders
COLUMNS = {
    "answer": "answer",
    "end": "its end token",
    "after": "what follows it",
    "header": "header before it",
    "user": "question",
    "system": "system prompt",
    "open": "text before the first message",
}


def measure(file: Path, rows: list, speller: Speller, own: list[list[int]] | None, cut: bool) -> dict:
    """What one file of batches holds. `own`: the ids of the rows under the folder's own template; `cut`: rows may be
    beginnings of these."""
    parts, begun = Parts(), Counter()
    equal, compared, example = 0, 0, None
    for line in file.read_text().splitlines():
        for document in documents(json.loads(line)):
            found = take_apart(document, rows, speller, parts)
            begun.update(found)
            if own is None or len(found) != 1:
                continue
            wanted = own[found[0]]
            same = document.ids == (wanted[: len(document.ids)] if cut else wanted)
            compared, equal = compared + 1, equal + same
            if not same and example is None:
                example = difference(wanted, document.ids, speller)
    tokens = {p: [parts.trained[p], parts.total[p]] for p in PARTS if parts.total[p]}
    made = {"tokens": tokens, "seen": {k: v for k, v in parts.seen.items() if v}}
    if lost := [i for i in range(len(rows)) if not begun[i]]:
        made["rows_absent"] = lost
    if own is not None:
        made["template_ids"] = [equal, compared]
        if example:
            made["example"] = example
    sample = {p: words for p, words in parts.sample.items() if p in ("header", "after", "open", "close")}
    return made | ({"sample": sample} if sample else {})


def difference(wanted: list[int], seen: list[int], speller: Speller) -> str:
    """The first place where two rows of ids differ."""
    pairs = enumerate(zip(wanted, seen, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(seen)))
    spelled = [speller.words(ids[max(0, at - 1) : at + 3]) or "(end)" for ids in (wanted, seen)]
    return f"token {at}: {spelled[1]!r} where the template has {spelled[0]!r}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def grouped(words: dict[str, str]) -> str:
    """Folder to word, the commonest word first: `all; none: llama3`."""
    if not words:
        return ""
    common = Counter(words.values()).most_common()
    rest = [f"{word}: {listed(f for f, w in words.items() if w == word)}" for word, _ in common[1:]]
    return "; ".join([common[0][0], *rest])


def share(results: list[dict], part: str) -> dict[str, str]:
    """Folder to all, none or `k of n`, of a part over the plain corpora."""
    sums: dict[str, list[int]] = {}
    for result in results:
        if result["corpus"] in PLAIN and (pair := result.get("tokens", {}).get(part)):
            kept = sums.setdefault(result["folder"], [0, 0])
            kept[0], kept[1] = kept[0] + pair[0], kept[1] + pair[1]
    return {f: "all" if t == n else "none" if t == 0 else "some" for f, (t, n) in sums.items()}


def by_setting(results: list[dict]) -> dict[tuple[str, str], list[dict]]:
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["peer"], result["setting"]), []).append(result)
    return groups


def table(results: list[dict]) -> str:
    """Markdown: a line for each peer and setting."""
    lines = [
        f"| library, setting | {' | '.join(COLUMNS.values())} | ids of the folder's template | two BOS |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for (peer, setting), group in by_setting(results).items():
        ran = [r for r in group if "tokens" in r]
        cells = [grouped(share(ran, part)) for part in COLUMNS]
        same = {f: _same(ran, f) for f in dict.fromkeys(r["folder"] for r in ran)}
        twice = {r["folder"] for r in ran if r["seen"].get("double_bos")}
        cells += [grouped({f: w for f, w in same.items() if w}), listed(twice and sorted(twice)) or "none"]
        lines.append(f"| {peer}, `{setting}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _same(results: list[dict], folder: str) -> str:
    pairs = [
        r["template_ids"] for r in results if r["folder"] == folder and r["corpus"] in PLAIN and "template_ids" in r
    ]
    equal, compared = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    return "" if not compared else "all" if equal == compared else "none" if equal == 0 else "some"


def page(results: list[dict], audits: list[dict], problems: dict[str, str]) -> str:
    """The whole page."""
    names = {r["peer"]: r["versions"] for r in results}
    versions = [f"- {peer}: {', '.join(f'{k} {v}' for k, v in found.items())}" for peer, found in names.items()]
    settings = {(r["peer"], r["setting"]): r["words"] for r in results}
    words = [f"- {peer}, `{setting}`: {text}" for (peer, setting), text in settings.items()]
    parts = [HEAD, table(results), "## Facts", "\n".join(f"- {line}" for line in facts(results))]
    if audits:
        parts += ["## What our audit says of the same batches", AUDIT_HEAD, audit_table(audits)]
    parts += ["## Versions", "\n".join(versions), "## Settings", "\n".join(words)]
    if problems:
        parts += ["## Not run", "\n".join(f"- {name}: {reason}" for name, reason in problems.items())]
    return "\n\n".join(parts) + "\n"


HEAD = """# Who trains what

Which tokens the data layers of other trainers label, measured on their own batches: preparation and collator of each
library, over six small corpora and nine model folders, on a CPU. Made by `benchmarks/who_trains_what.py`; all counts
are in [who_trains_what.json](../benchmarks/results/who_trains_what.json). Rerun:

    pip install -e '.[audit-peers]'
    python benchmarks/who_trains_what.py --audit trl renderers

That runs `transformers`, TRL and renderers; each other library runs where `--python NAME=INTERPRETER` has it, in an
environment of its own. Six tokenizers: SmolLM2's (also with Qwen's templates: qwen2.5, qwen3), Llama 2's (also with
TinyLlama's template), Mistral's v0.1 and v0.3, and Llama 3's (also with Llama 3.1's template).
LLaMA-Factory runs with an empty stand-in for torchaudio, which texts do not need. The libraries were run one
after another, and their results merged (`--merge`).

The table has the corpora single, turns, system and edges: `all`, `some` or `none` of a part's tokens have a label, for
most folders first, for others by name. "Header before it" is what lies between a question and its answer, with the
token that ends the question; "what follows it" lies between an answer's end token and the next message. The last
columns compare with the ids that `transformers` gives for the folder's own chat template."""
AUDIT_HEAD = """Rules of `ptst audit --batches FILE --model FOLDER --messages FILE` with the number of findings, over
all corpora but long; notes are left out."""


def audit_table(audits: list[dict]) -> str:
    """Markdown: a line for each peer and setting, with the rules that spoke, by folder."""
    lines = ["| library, setting | findings |", "|---|---|"]
    groups: dict[tuple[str, str], list[dict]] = {}
    for said in audits:
        groups.setdefault((said["peer"], said["setting"]), []).append(said)
    for (peer, setting), group in groups.items():
        words = {said["folder"]: _audit_words(said) for said in group}
        lines.append(f"| {peer}, `{setting}` | {grouped(words)} |")
    return "\n".join(lines)


def _audit_words(said: dict) -> str:
    if "refused" in said:
        return f"refused ({said['refused']})"
    found = {k.partition(": ")[2]: n for k, n in said["found"].items() if not k.startswith("info")}
    return ", ".join(f"{rule} {n}" for rule, n in found.items()) or "none"


def facts(results: list[dict]) -> list[str]:
    """One sentence for each thing that ran, by library; what several settings share is said once. Each can be rerun
    with the script."""
    said: dict[tuple[str, str], list[str]] = {}
    for (_, setting), group in by_setting(results).items():
        head, sentences = _facts_of(group)
        for sentence in sentences:
            said.setdefault((head, sentence), []).append(f"`{setting}`")
    return [f"{head}, {', '.join(settings)}: {sentence}." for (head, sentence), settings in said.items()]


def _facts_of(group: list[dict]) -> tuple[str, list[str]]:
    """Library with version, and sentences."""
    first = group[0]
    versions = first["versions"]
    name = {"cookbook": "llama-cookbook"}.get(first["peer"], first["peer"])
    head = f"{name} {versions.get(name, '?')}"
    errors: dict[str, list[dict]] = {}
    for result in group:
        if "error" in result:
            errors.setdefault(result["error"], []).append(result)
    said = [f"raises `{text}` ({_where(where)})" for text, where in errors.items()]
    ran = [r for r in group if "tokens" in r]
    plain = [r for r in ran if r["corpus"] in PLAIN]
    for part, words in (("end", "the token that ends an answer"), ("answer", "tokens of answers")):
        for state in ("none", "some"):
            hit = [f for f, word in share(ran, part).items() if word == state]
            if hit:
                counts = _counts(plain, part, hit)
                said.append(f"labels {counts} of {words}: {_folders(hit)}")
    for part, words in (("header", "role markers before an answer"), ("after", "what follows the end token")):
        said += _labeled(plain, part, words)
    said += _labeled(plain, "bos", "BOS")
    # Control tokens in a text swallow spaces, so that its words may not be found.
    spelled = [r for r in ran if r["corpus"] != "control"]
    for key, words in SEEN.items():
        hit = [r for r in (ran if key == "double_bos" else spelled) if r["seen"].get(key)]
        if hit:
            said.append(f"{words} ({sum(r['seen'][key] for r in hit)} in {_where(hit)})")
    said += _differences(plain)
    absent = [r for r in spelled if "rows_absent" in r]
    if absent:
        number = sum(len(r["rows_absent"]) for r in absent)
        of = sum(r["rows"] for r in absent)
        said.append(f"the questions of {number} of {of} rows are in no batch ({_where(absent)})")
    return head, said


SEEN = {
    "double_bos": "a document begins with two BOS tokens",
    "joined": "a document that the arrays do not divide holds several conversations",
    "headless": "a document holds no row's question",
    "system_missing": "the text of the system prompt is not in the document",
    "stripped": "outer whitespace of an answer is not in the tokens",
    "cut_answers": "an answer is cut",
    "cut_before_answer": "an answer is absent",
    "ends_without_end": "a document ends in an answer without an end token",
}


def _where(results: list[dict]) -> str:
    folders = dict.fromkeys(r["folder"] for r in results)
    corpora = listed(r["corpus"] for r in results)
    return f"{_folders(folders)}; {corpora}"


def _folders(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return "all folders" if len(unique) >= ALL else listed(unique)


def _counts(results: list[dict], part: str, folders: list[str]) -> str:
    pairs = [r["tokens"][part] for r in results if r["folder"] in folders and part in r["tokens"]]
    return f"{sum(p[0] for p in pairs)} of {sum(p[1] for p in pairs)}"


def _labeled(results: list[dict], part: str, words: str) -> list[str]:
    hit = [r for r in results if r["tokens"].get(part, [0])[0]]
    if not hit:
        return []
    samples: dict[str, str] = {}
    for result in hit:
        samples.setdefault(result.get("sample", {}).get(part, ""), result["folder"])
    samples.pop("", None)
    example = ", such as " + ", ".join(f"{s!r} ({f})" for s, f in list(samples.items())[:3]) if samples else ""
    folders = [r["folder"] for r in hit]
    return [f"labels {_counts(results, part, folders)} tokens of {words}{example}: {_folders(folders)}"]


def _differences(results: list[dict]) -> list[str]:
    """Folders by how many of their rows have other ids than the template gives, with the first difference."""
    folders: dict[str, list[str]] = {}
    examples: dict[str, str] = {}
    for folder in dict.fromkeys(r["folder"] for r in results):
        own = [r for r in results if r["folder"] == folder and "template_ids" in r]
        equal, compared = (sum(r["template_ids"][i] for r in own) for i in (0, 1))
        if equal < compared:
            words = f"{equal} of {compared} rows"
            folders.setdefault(words, []).append(folder)
            examples.setdefault(words, next(f"in {folder} {r['example']}" for r in own if "example" in r))
    return [
        f"{words} have the ids of the folder's template ({_folders(names)}); {examples[words]}"
        for words, names in folders.items()
    ]
