"""How fast do rows of a file become token ids on disk, and in how much memory? Ours, with a loss mask, checks and
fingerprints, against `datasets.map` with the fast tokenizer, which renders the same text and keeps its ids.

    python benchmarks/encode_rows.py                      50,000 rows like GSM8K's, and 500,000 for the memory
    python benchmarks/encode_rows.py --rows 20000 --more 0
    python benchmarks/encode_rows.py --file ROWS.jsonl    with GSM8K's columns, in place of rows of our own
    python benchmarks/encode_rows.py --model FOLDER --json FILE

`ratio`: rows per second of CPU time (user and system, of all processes), ours divided by the peer's, the median of all
rounds; above 1 ours is faster. Both begin with the JSONL file and end with arrays on disk; neither has a cache, and
each round is a process of its own, whose imports are not counted. `peak`: the largest resident memory of a process,
mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # CPU time, not cores, is compared

DEFAULT = Path("checkpoints/smollm2-135m-instruct")
ROUNDS = 3
LIMIT = 8192  # tokens


def write_rows(path: Path, rows: int) -> None:
    """Word problems with worked answers, each with a number of its own."""
    from ptst.data.builtin.word_problems import generate

    problems = generate("train", 4000)
    with open(path, "w") as file:
        for i in range(rows):
            p = problems[i % len(problems)]
            file.write(json.dumps({"question": f"{p.question} (case {i})", "answer": p.answer}) + "\n")


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def ours(path: str, model: str) -> int:
    """Tokens of all examples."""
    from ptst.data import kept_rows
    from ptst.data.examples import TrainingSource, mix
    from ptst.data.sources import load
    from ptst.text.prompt_format import open_prompt_format
    from ptst.text.templates import find_template

    kept_rows.LARGE = 0
    prompt_format = open_prompt_format(Path(model), find_template("vanilla"), "gsm8k")
    begin()
    mixture = mix([TrainingSource(load(path))], prompt_format, LIMIT, "drop", "all")
    return mixture.records[0].tokens


def peer(path: str, model: str) -> int:
    """Tokens of all rows."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))

    def encode(rows: dict) -> dict:
        texts = [
            f"<|im_start|>user\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            for question, answer in zip(rows["question"], rows["answer"], strict=True)
        ]
        return {"input_ids": [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]}

    begin()
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        found = rows.map(encode, batched=True, remove_columns=rows.column_names)
        return sum(len(chunk.flatten()) for chunk in found.data.column("input_ids").chunks)


_begun: list[float] = []


def begin() -> None:
    """All is imported: time is measured from here."""
    _begun[:] = [cpu_seconds(), time.perf_counter()]


def measure(side: str, path: Path, model: Path) -> dict:
    """One side in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as home:
        words = [sys.executable, __file__, "--side", side, str(path), "--model", str(model)]
        env = {**os.environ, "PTST_HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout)


def run_side(side: str, path: str, model: str) -> None:
    """In that process."""
    tokens = {"ours": ours, "peer": peer}[side](path, model)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu, wall = cpu_seconds() - _begun[0], time.perf_counter() - _begun[1]
    print(json.dumps({"tokens": tokens, "cpu": cpu, "wall": wall, "peak_mb": max(peaks) // 1024}))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=DEFAULT)
    flags.add_argument("--rows", type=int, default=50_000)
    flags.add_argument("--more", type=int, default=500_000, help="rows of the second measure of memory; 0: none")
    flags.add_argument("--file", type=Path, help="JSONL with question and answer")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.side:
        run_side(*args.side, str(args.model))
        return
    with tempfile.TemporaryDirectory() as here:
        path = Path(here) / "rows.jsonl"
        if args.file:
            path, args.more = args.file, 0
            args.rows = sum(1 for _ in path.open())
        else:
            write_rows(path, args.rows)
        rounds = [[measure(side, path, args.model) for side in ("ours", "peer")] for _ in range(ROUNDS)]
        ratio = statistics.median(b["cpu"] / a["cpu"] for a, b in rounds)
        figures = {"rows": args.rows, "ratio": ratio, "rounds": rounds, "python": platform.python_version()}
        for side, found in zip(("ours", "datasets.map"), zip(*rounds, strict=True), strict=True):
            cpu = statistics.median(one["cpu"] for one in found)
            peak = max(one["peak_mb"] for one in found)
            print(f"{side:13} {args.rows / cpu:8.0f} rows per CPU-second, {found[0]['tokens']} tokens, peak {peak} MB")
        print(f"ratio {ratio:.2f}", flush=True)
        if args.more:
            write_rows(path, args.more)
            figures["more"] = measure("ours", path, args.model)
            print(f"ours, {args.more} rows: peak {figures['more']['peak_mb']} MB")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
