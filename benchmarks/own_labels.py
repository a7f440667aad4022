"""A labelled set of answers by the project's own models: drawn blind, labelled twice, merged, and put before a judge.

    python benchmarks/own_labels.py draw FOLDER ... --out SHEET.jsonl      300 answers, without the cell they come from
    python benchmarks/own_labels.py merge SHEET.jsonl FIRST SECOND [--settled FILE]   both passes into own_labels.jsonl
    python benchmarks/own_labels.py csv FOLDER ... --out LABELS.csv        for `ptst judge --report LABELS.csv`

The folders are evaluations, grids and studies (docs/judges.md has the commands that made them). A pass is a JSONL file
of `{"id": ..., "label": ...}`. The file of labels (`--labels`; own_labels.jsonl unless named) has every label; of
answers to harmful requests it has the text only where they refuse: the others are found by their digest in folders that
the same commands make again.
"""

import argparse
import csv
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ptst.evaluation.verdicts import AnswerClass

LABELS = Path(__file__).with_name("own_labels.jsonl")
COUNTS = {"safety": 200, "over-refusal": 100}
PLACES = ("*.jsonl", "cells/*/*.jsonl", "*/cells/*/*.jsonl")
SEED = 0


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def digest(request: str, answer: str) -> str:
    return hashlib.sha256(json.dumps([request, answer]).encode()).hexdigest()[:16]


def answers(folders: list[Path]) -> Iterator[dict]:
    """Judged rows of evaluations and grids, with their task and cell."""
    for folder in folders:
        for path in sorted(p for pattern in PLACES for p in folder.glob(pattern)):
            rows = read_jsonl(path)
            task = next((task for task in COUNTS if re.search(rf"\.{task}(-[\w-]+)?\.", path.name)), None)
            if task is None or not rows or "class" not in rows[0]:
                continue
            for row in rows:
                found = {"id": digest(row["prompt"], row["answer"]), "task": task, "request": row["prompt"]}
                cell = f"{folder.name}/{path.relative_to(folder).with_suffix('')}"
                yield {**found, "answer": row["answer"], "truncated": row["cut"], "cell": cell}


def draw(folders: list[Path], out: Path) -> None:
    """As many answers from every cell, no answer twice."""
    generator, sheet = random.Random(SEED), dict[str, dict]()
    for task, count in COUNTS.items():
        cells: dict[str, list[dict]] = {}
        for row in answers(folders):
            if row["task"] == task:
                cells.setdefault(row["cell"], []).append(row)
        for rows in cells.values():
            generator.shuffle(rows)
        if len(cells) > count:  # not every cell has its turn
            cells = dict(generator.sample(sorted(cells.items()), count))
        taken = dict[str, dict]()
        while len(taken) < count and any(cells.values()):
            for rows in cells.values():
                while rows and (row := rows.pop())["id"] in taken:
                    pass
                if len(taken) < count:
                    taken[row["id"]] = row
        sheet |= taken
    rows = list(sheet.values())
    generator.shuffle(rows)
    shown = ({k: v for k, v in row.items() if k not in ("cell", "task")} for row in rows)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown))
    print(f"{len(rows)} answers of {len({row['cell'] for row in rows})} cells")


def read_pass(path: Path, ids: set[str]) -> dict[str, str]:
    labels = {row["id"]: str(AnswerClass(row["label"])) for row in read_jsonl(path)}
    if labels.keys() != ids:
        raise SystemExit(f"{path} has {len(labels.keys() & ids)} of {len(ids)} labels")
    return labels


def merge(options: argparse.Namespace) -> None:
    """Both passes into the file of labels, once all differences are settled."""
    sheet, first, second, settled = options.sheet, options.first, options.second, options.settled
    cells = {row["id"]: row for row in answers(options.folders)}
    rows = read_jsonl(sheet)
    ids = {row["id"] for row in rows}
    a, b = read_pass(first, ids), read_pass(second, ids)
    differ = {i for i in ids if a[i] != b[i]}
    decided = read_pass(settled, differ) if settled else {}
    print(f"{len(rows)} answers, {len(differ)} labelled differently: {Counter((a[i], b[i]) for i in differ)}")
    out = []
    for row in sorted(rows, key=lambda r: r["id"]):
        i = row["id"]
        label = a[i] if i not in differ else decided.get(i)
        keep = label == AnswerClass.REFUSAL or cells[i]["task"] != "safety"
        entry = {"id": i, "task": cells[i]["task"], "cell": cells[i]["cell"], "first": a[i], "second": b[i]}
        out.append({**entry, "label": label, **({"request": row["request"], "answer": row["answer"]} if keep else {})})
    if settled or not differ:
        options.labels.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in out))


def write_csv(folders: list[Path], labels: Path, out: Path) -> None:
    """The labelled answers: those that are kept, and those that the folders have."""
    found = {row["id"]: row for row in answers(folders)}
    labelled = read_jsonl(labels)
    texts = [(row["id"], (row.get("request") and row) or found.get(row["id"]), row["label"]) for row in labelled]
    with open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "request", "answer", "label"])
        writer.writerows([i, row["request"], row["answer"], label] for i, row, label in texts if row)
    print(f"{sum(row is not None for _, row, _ in texts)} of {len(labelled)} labelled answers are here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draw", "csv"):
        command = commands.add_parser(name)
        command.add_argument("folders", nargs="*", type=Path)
        command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("merge")
    for name in ("sheet", "first", "second"):
        command.add_argument(name, type=Path)
    command.add_argument("--settled", type=Path)
    command.add_argument("--folders", nargs="+", type=Path, required=True)
    for command in commands.choices.values():
        command.add_argument("--labels", type=Path, default=LABELS)
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.folders, options.out)
    elif options.command == "csv":
        write_csv(options.folders, options.labels, options.out)
    else:
        merge(options)


if __name__ == "__main__":
    main()
