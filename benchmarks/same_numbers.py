"""Whether two checkouts of this project compute the same numbers, to the last bit.

For changes that must not change anything that is computed: renamed flags, files and keys, moved code. The same fixed
workload is run with each checkout, through its commands alone, and every number and digest is compared.

    git worktree add ../before COMMIT
    python benchmarks/same_numbers.py record --checkout ../before --out before.json
    python benchmarks/same_numbers.py record --checkout . --out after.json
    python benchmarks/same_numbers.py compare before.json after.json

`--quick` leaves out the parts with the default model, which must lie in the checkout's checkpoints/ otherwise. Both
records must be made on the same machine with the same packages; everything runs on the CPU with one thread. `compare`
exits with 1 where anything differs, is missing or went wrong. Where a renaming makes a number go missing, add the new
name to the tables at the top of same_numbers_read.py; the record of the checkout before stays valid.

Compared are: training (LoRA, all weights, mixed data, recomputed layers, bfloat16), a run that was killed and went on,
greedy and sampled answers, all tasks, audits, and a small grid. Not compared are: texts for people, files' bytes,
ptst.align and ptst.chat, several processes, GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import same_numbers_read as read
import torch
from same_numbers_inputs import write_inputs

# Prints where the package is imported from, and its kernels, which were a package beside it once.
IMPORTED = """import importlib, pathlib, ptst
inside = (pathlib.Path(ptst.__file__).parent / "kernels").exists()
print(ptst.__file__, importlib.import_module("ptst.kernels" if inside else "kernels").__file__, sep="\\n")"""
LIMIT = 900  # seconds that a command may take
SHOWN = 12  # differences of a part that are written out
TINY = ("--model", "model", "--json")
LORA = (*TINY, "--data", "problems.jsonl", "--val-data", "test-problems.jsonl", "--examples-per-step", "4")
LORA += ("--epochs", "4", "--max-steps", "24", "--eval-every", "8", "--save-every", "2", "--seed", "3")
TRAINED = {
    "lora": LORA,
    "full": (
        *TINY, "--full", "--limit", "64", "--max-steps", "8", "--eval-every", "3", "--lr", "0.001",
        "--schedule", "cosine", "--tokens-per-step", "2048", "--template", "text:alpaca",
    ),
    "mixed": (
        *TINY, "--data", "problems.jsonl", "--mix", "mixed-in.jsonl:1", "--val-data", "mixed-in.jsonl",
        "--max-steps", "8", "--eval-every", "4", "--dropout", "0.1", "--weight-decay", "0.01", "--schedule", "step",
        "--train-on", "last", "--rank", "4",
    ),
    "recompute": (
        *TINY, "--template", "chat:llama", "--recompute", "block", "--micro-tokens", "1024", "--max-steps", "6",
        "--eval-every", "3", "--clip", "0.5",
    ),
    "bfloat16": (*TINY, "--dtype", "bfloat16", "--max-steps", "4", "--data", "problems.jsonl", "--template", "alpaca"),
}  # fmt: skip
EVALUATED = {
    "greedy": ("--model", "model", "--tasks", "safety", "--limit", "100", "--max-new-tokens", "24"),
    "sampled": (
        "--model", "model", "--tasks", "prompts:prompts.jsonl", "--limit", "20", "--max-new-tokens", "40",
        "--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--template", "vanilla", "--batch-size", "7",
    ),
    "tasks": (
        "--checkpoint", "lora", "--tasks", "gsm8k", "nll", "safety", "over-refusal", "arc-easy:choices.jsonl",
        "xstest:types.jsonl", "--data", "test-problems.jsonl", "--limit", "10", "--max-new-tokens", "24",
    ),
    "bfloat16": (
        "--model", "full", "--tasks", "nll", "safety", "--limit", "8", "--max-new-tokens", "16", "--dtype", "bfloat16",
        "--template", "chat:mpt", "--temperature", "0.7", "--top-k", "20", "--decode-seeds", "2",
    ),
}  # fmt: skip
DEFAULT_MODEL = {
    "default-model": (
        "--model", "smollm2-135m-instruct", "--tasks", "safety", "nll", "--limit", "16", "--max-new-tokens", "48",
    ),
    "similarity": ("--model", "model", "--tasks", "chatdoctor:doctor.jsonl", "--max-new-tokens", "40"),
}  # fmt: skip
AUDITED = (
    ("plain", "chat:vanilla"),
    ("plain", "chat:llama"),
    ("plain", "text:alpaca"),
    ("marks", "chat:vanilla"),
    ("marks", "chat:llama", "--chat-format", "llama2"),
    ("twice", "chat:llama"),
    ("blank", "chat:vanilla"),
    ("blank", "chat:llama"),
    ("turns", "chat:vanilla"),
    ("turns", "chat:llama"),
    ("turns", "text:alpaca"),
)
GRID = (
    "--model", "model", "--train-templates", "chat:vanilla", "chat:llama", "--test-templates", "chat:vanilla",
    "chat:llama", "--seeds", "0", "--tasks", "safety", "over-refusal", "nll", "margin", "--train.max-steps", "4",
    "--eval.limit", "10", "--eval.max-new-tokens", "24", "--out", "grid", "--json",
)  # fmt: skip


class Failed(Exception):
    """A command of a checkout did not do what the workload needs."""


class Checkout:
    """One checkout's commands, run in a work folder."""

    def __init__(self, folder: Path, work: Path):
        self.folder, self.work = folder, work
        self.help: dict[str, str] = {}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PTST_", "PYTHON"))},
            "PYTHONPATH": str(folder),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": str(work / ".numba"),
            "HF_HOME": str(work / ".huggingface"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
        }
        found = self.call(["-c", IMPORTED])
        print(found.stdout.strip(), file=sys.stderr)
        if found.returncode or not all(Path(x).resolve().is_relative_to(folder) for x in found.stdout.split()):
            raise SystemExit(f"python does not take ptst from {folder}, but from {found.stdout or found.stderr}")

    def call(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *arguments]
        options: dict[str, Any] = {"cwd": self.work, "env": self.environment, "timeout": LIMIT}
        return subprocess.run(line, capture_output=True, text=True, **options)

    def line(self, name: str, words: tuple[str, ...]) -> list[str]:
        """The arguments of a command, its flags spelled as this checkout spells them."""
        out = ["-m", f"ptst.{name}"]
        for word in words:
            others = read.FLAGS.get(re.sub(r"^--(train|eval)\.", "--", word))
            if others:
                if name not in self.help:
                    self.help[name] = self.call(["-m", f"ptst.{name}", "--help"]).stdout
                part = re.match(r"--((train|eval)\.)?", word)[0]
                spellings = [word, *(part + other.removeprefix("--") for other in others)]
                listed = [s for s in spellings if re.search(rf"{re.escape(s)}(?![\w-])", self.help[name])]
                word = next(iter(listed), word)
            out.append(word)
        return out

    def run(self, name: str, words: tuple[str, ...], fine: tuple[int, ...] = (0,)) -> tuple[int, dict[str, Any]]:
        """Exit code, and the JSON object that the command printed ({} where it printed none)."""
        done = self.call(self.line(name, words))
        if done.returncode not in fine:
            raise Failed(f"ptst.{name} ended with {done.returncode}: {' '.join(done.stderr.split())[-400:]}")
        last = done.stdout.strip().split("\n")[-1]
        return done.returncode, json.loads(last) if last.startswith("{") else {}

    def train(self, name: str, words: tuple[str, ...]) -> dict[str, Any]:
        _, printed = self.run("train", (*words, "--out", name))
        return read.run(self.work / name) | read.numbers(printed, ("result",))

    def killed(self) -> dict[str, Any]:
        """The LoRA run again, killed after its second state and then continued."""
        out = self.work / "killed"
        line = [sys.executable, *self.line("train", (*LORA, "--out", "killed"))]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(line, cwd=self.work, env=self.environment, stdout=quiet, stderr=quiet) as process:
            began = time.monotonic()
            while process.poll() is None and time.monotonic() - began < LIMIT:
                if any(re.search(r"\D0*4$", p.name) for pattern in read.STATES for p in out.glob(pattern)):
                    break
                time.sleep(0.005)
            if process.poll() is not None:
                raise Failed("the run ended before a saved state was seen; look at STATES in same_numbers_read.py")
            process.send_signal(signal.SIGKILL)
        first = read.find(out, read.METRICS)[0].read_text("utf-8").partition("\n")[0]
        found = self.train("killed", LORA)
        if read.find(out, read.METRICS)[0].read_text("utf-8").partition("\n")[0] != first:
            raise Failed("the run that was killed did not go on, it began anew")
        if found["weights"] != read.weights(self.work / "lora"):
            raise Failed("the run that was killed and went on has other weights than the one that was not")
        return found

    def evaluate(self, name: str, words: tuple[str, ...]) -> dict[str, Any]:
        _, printed = self.run("eval", (*words, "--out", f"eval-{name}", "--json"))
        return read.evaluation(self.work / f"eval-{name}", printed)

    def audit(self, data: str, template: str, *flags: str) -> dict[str, Any]:
        words = (*TINY, "--data", f"audit-{data}.jsonl", "--template", template, "--test-template", "chat:llama")
        code, report = self.run("audit", (*words, *flags, "--rows", "20", "--micro-tokens", "4096"), fine=(0, 1))
        return {"exit code": code, **read.audit(report)}

    def grid(self) -> dict[str, Any]:
        self.run("grid", GRID)
        return read.grid(self.work / "grid")


def parts(checkout: Checkout, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The workload in its order, by name."""
    out: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, words in TRAINED.items():
        out[f"train {name}"] = lambda name=name, words=words: checkout.train(name, words)
    out["train killed"] = checkout.killed
    for name, words in (EVALUATED if quick else EVALUATED | DEFAULT_MODEL).items():
        out[f"eval {name}"] = lambda name=name, words=words: checkout.evaluate(name, words)
    for words in AUDITED:
        out[f"audit {' '.join(words)}"] = lambda words=words: checkout.audit(*words)
    out["grid"] = checkout.grid
    return out


def record(folder: Path, out: Path, quick: bool) -> int:
    folder = folder.resolve()
    began = time.monotonic()
    found: dict[str, Any] = {"quick": quick, "torch": torch.__version__, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as work:
        write_inputs(Path(work))
        (Path(work) / "checkpoints").mkdir()
        for model in (folder / "checkpoints").glob("*/" if not quick else "none"):
            (Path(work) / "checkpoints" / model.name).symlink_to(model)
        checkout = Checkout(folder, Path(work))
        for name, part in parts(checkout, quick).items():
            start = time.monotonic()
            try:
                found["parts"][name] = part()
            except (Failed, read.Unreadable, subprocess.TimeoutExpired, OSError, ValueError, KeyError) as error:
                found["parts"][name] = {"error": f"{type(error).__name__}: {error}"}
            out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            told = found["parts"][name].get("error") or f"{len(found['parts'][name])} numbers and digests"
            print(f"{name}: {told} ({time.monotonic() - start:.0f} s)", file=sys.stderr)
    print(f"{out}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(any("error" in part for part in found["parts"].values()))


def compare(first: Path, second: Path) -> int:
    one, two = (json.loads(path.read_text()) for path in (first, second))
    for key in ("quick", "torch"):
        if one[key] != two[key]:
            print(f"the records cannot be compared: {key} is {one[key]} and {two[key]}")
            return 2
    differing = 0
    a, b = ({name: read.canonical(part) for name, part in r["parts"].items()} for r in (one, two))
    width = max(map(len, {**a, **b}), default=0)
    for name in {**a, **b}:
        left, right = a.get(name, {}), b.get(name, {})
        wrong = [k for k in {**left, **right} if k == "error" or k not in left or k not in right or left[k] != right[k]]
        differing += bool(wrong)
        print(f"{name:<{width}}  {len(left):>5}  {f'{len(wrong)} differ' if wrong else 'same'}")
        for key in wrong[:SHOWN]:
            print(f"    {key}: {_shown(left, right, key)}")
        if len(wrong) > SHOWN:
            print(f"    and {len(wrong) - SHOWN} more")
    total = sum(map(len, a.values()))
    print(
        f"{differing} of {len({**a, **b})} parts differ"
        if differing
        else f"all {total} numbers and digests are the same"
    )
    return int(differing > 0)


def _shown(left: dict[str, Any], right: dict[str, Any], key: str) -> str:
    x, y = left.get(key, "missing"), right.get(key, "missing")
    if isinstance(x, list) and isinstance(y, list):
        places = [i for i in range(max(len(x), len(y))) if x[i : i + 1] != y[i : i + 1]]
        i = places[0]
        return f"{len(places)} of {max(len(x), len(y))}, the first {i}: {x[i : i + 1]} | {y[i : i + 1]}"
    return f"{str(x)[:200]} | {str(y)[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run the workload with a checkout")
    recorder.add_argument("--checkout", type=Path, required=True, help="folder of the checkout")
    recorder.add_argument("--out", type=Path, required=True, help="JSON file to write")
    recorder.add_argument("--quick", action="store_true", help="only what needs no model but a random one")
    comparer = commands.add_parser("compare", help="compare two records")
    comparer.add_argument("first", type=Path)
    comparer.add_argument("second", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.first, given.second)
    return record(given.checkout, given.out, given.quick)


if __name__ == "__main__":
    sys.exit(main())
