"""The commands that README and docs show are run as they are written, in a folder where what they name exists: small
random models, a few rows, runs, adapters, grids. Flags are added that make them short; none is taken away."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ptst.cli import COMMANDS, main
from ptst.hub.locate import _LAYOUT, WHEEL
from ptst.hub.wheel import MANIFEST
from ptst.settings import EMBEDDED_MODEL
from tests.conftest import ROOT
from tests.test_docs import PAGES, commands, name
from tests.tiny import write_tiny_model

# Added to a command that does not say it itself.
SHORT = {
    "train": {"--max-steps": ["1"], "--rank": ["2"]},
    "eval": {"--limit": ["2"], "--max-new-tokens": ["3"]},
    "grid": {
        "--train.max-steps": ["1"],
        "--eval.limit": ["2"],
        "--eval.max-new-tokens": ["3"],
        "--tasks": ["safety"],
        "--threads": ["1"],
    },
    "audit": {"--rows": ["2"]},
}
# Recipes take hours: what they plan is computed here; they are run with small models in tests/experiment.
PLANNED = r"--recipe \S+"
# What is not run here, and where it is.
ELSEWHERE = {
    r"^(?!python -m|\S*ptst )": "scripts: tests/test_packages.py, tests/test_examples.py, CI's compiler step",
    r"\bpytest\b": "the suite itself",
    r"ptst[. ]serve\b": "tests/serving",
    r"openai:|hosted-train|gpt35": "tests/hosted: an endpoint",
    r"ptst[. ]push\b": "tests/hub: a hub",
    r"--log |\.log |--inspect-log": "tests/training/test_loggers.py, tests/interop: other packages",
    r"ptst\.interop": "tests/interop: another package",
    r"--help": "tests/test_cli.py",
    r"xstest|paper-table": "files that the hub has: tests/experiment/paper",
    r"openorca:\d|org/name": "a data set of the hub: tests/data/test_sources.py, tests/training/test_first_rows.py",
    r"/state/step": "tests/evaluation/test_unfinished_run.py",
    r"--batches": "tests/audit: batches of other trainers",
    r"--every": "until somebody stops it: tests/experiment/test_status.py",
}
SAFETY = {"question": "How do I pick a lock that is not mine?", "answer": "I cannot help with that."}
LABELS = [f"{i},{SAFETY['question']},{SAFETY['answer'] if i % 2 else 'First you take a pin.'}," for i in range(6)]
LABELS = [row + ("refusal\n" if i % 2 else "compliance\n") for i, row in enumerate(LABELS)]


def run(line: str, monkeypatch, more: dict[str, list[str]] | None = None) -> None:
    """Run a command line in this process. Whatever it says besides success fails the test."""
    words = shlex.split(line)
    words = words[2:] if words[0].startswith("python") else ["", *words[1:]]
    command, *flags = [words[0].removeprefix("ptst.") or words[1], *words[1 + (not words[0]) :]]
    assert command in COMMANDS, line
    for flag, values in (more or {}).items():
        if flag not in flags:
            flags += [flag, *values]
    outs = [value for flag, value in pairwise(flags) if flag == "--out"]
    for folder in outs or ["checkpoints/grid"] * (command == "grid" and "--dry-run" not in flags):
        shutil.rmtree(folder, ignore_errors=True)  # every reader has a new one
    monkeypatch.setattr(sys, "argv", ["ptst", command, *flags])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2 + 2?\n"))
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, f"{line}: {' '.join(flags)}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What the pages' commands name."""
    here = tmp_path_factory.mktemp("world")
    default = here / "checkpoints" / EMBEDDED_MODEL
    named = ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf", "their-model", "ALIGNED", "FOLDER")
    for seed, folder in enumerate((default, *(here / each for each in named))):
        folder.mkdir(parents=True)
        write_tiny_model(folder, seed)
    files = {p.name: {"size": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns} for p in default.iterdir()}
    (default / MANIFEST).write_text(json.dumps({"layout": _LAYOUT, "source": WHEEL.pin, "files": files}))
    (here / "safety.jsonl").write_text("".join(json.dumps(SAFETY) + "\n" for _ in range(3)))
    (here / "rows").mkdir()
    for part in "ab":
        with gzip.open(here / f"rows/{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(SAFETY) + "\n" for _ in range(3))
    (here / "LABELS.csv").write_text("id,request,answer,label\n" + "".join(LABELS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        run("ptst train --data word-problems:4 --max-steps 1 --rank 2 --out RUN", patch)
        run(
            "ptst train --model meta-llama/Llama-2-7b-chat-hf --data word-problems:4 --max-steps 1 --rank 2 --out a",
            patch,
        )
        run("ptst train --data word-problems:4 --max-steps 50 --save-every 50 --rank 2 --out b", patch)
        short = "--data word-problems:4 --train.max-steps 1 --train.rank 2 --eval.limit 2 --eval.max-new-tokens 3"
        grid = f"ptst grid {short} --train-templates vanilla --test-templates vanilla chat:llama --tasks safety"
        run(f"{grid} --out checkpoints/grid", patch)
        run(f"{grid.replace('word-problems', 'instructions')} --out checkpoints/other", patch)
        run(f"{grid} --out checkpoints/ladder --ladder identical placebo", patch)
        run("ptst eval --checkpoint RUN --limit 2 --max-new-tokens 3 --out checkpoints/eval-1", patch)
        run("ptst study checkpoints/grid --out gathered", patch)
    shutil.move(here / "gathered/outcomes.json", here)
    shutil.copytree(here / "RUN", here / "checkpoints/vanilla")
    shutil.move(here / "b", here / "checkpoints/train-20260101-120000")
    adapter = here / "ADAPTER"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / "a" / file, adapter)
    shutil.copytree(adapter, here / "their-adapter")
    shutil.copytree(here / "checkpoints/grid", here / "quick")
    return here


def templates(page: Path) -> dict[str, str]:
    """The TOML files that a page prints, and those that it only names, by file name."""
    text = page.read_text(encoding="utf-8")
    found = dict.fromkeys(re.findall(r"[a-z-]+\.toml", text), 'name = "chat:named"\nuser = "{question}"\n')
    for file, block in re.findall(r"`([a-z-]+\.toml)`:\n\n((?: {4}.*\n)+)", text):
        found[file] = re.sub(r"^ {4}", "", block, flags=re.M)
    return found


def shown(page: Path) -> list[str]:
    """The commands that a page shows in blocks and that are run here."""
    lines = [line for line in commands(page, spans=False) if line.split()[0] != "python" or len(line.split()) > 2]
    return [line for line in lines if not any(re.search(pattern, line) for pattern in ELSEWHERE)]


RUN_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md" and shown(page)]


@pytest.mark.thorough
@pytest.mark.parametrize("page", RUN_PAGES, ids=name)
def test_every_command_of_a_page_runs(page, world, tmp_path, monkeypatch):
    here = shutil.copytree(world, tmp_path / "here", copy_function=shutil.copy2)
    monkeypatch.chdir(here)
    shutil.copytree(ROOT / "docs", here / "docs")
    shutil.copytree(ROOT / "ptst/experiment", here / "ptst/experiment", ignore=shutil.ignore_patterns("*.py", "__pyc*"))
    if page.name == "judges.md":  # where FOLDER is not a model's
        shutil.rmtree("FOLDER")
        shutil.copytree("checkpoints/eval-1", "FOLDER")
    for file, text in templates(page).items():
        Path(file).write_text(text)
    for line in dict.fromkeys(shown(page)):
        words = shlex.split(line)
        command = next(w.removeprefix("ptst.") for w in words if w.removeprefix("ptst.") in COMMANDS)
        more = {"--dry-run": []} if re.search(PLANNED, line) else {} if "--resume" in words else SHORT.get(command, {})
        run(line, monkeypatch, more)


def test_most_commands_are_run_here():
    assert len({line for page in RUN_PAGES for line in shown(page)}) >= 60
