"""From a file of millions of rows to the first training step: CPU time, and the largest memory of all together.

    python benchmarks/many_rows.py                        4,000,000 short sums
    python benchmarks/many_rows.py --rows 100000 --flags --order file
    python benchmarks/many_rows.py --rows 600000 --words 250 --json FILE
    python benchmarks/many_rows.py --rows 200000 --audit  of ptst.audit in place of training

`--words`: random words that are added to each question, so that rows are as long as those of other data. A model of
one tiny layer with the embedded model's tokenizer takes one step. `cpu`: user and system seconds of all processes.
`peak`: the largest sum of their proportional set sizes (Pss: a page that n processes share counts as 1/n, and
mapped files count), looked at every second; `anonymous`: that part of it which no file backs. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.weights import save_full

DEFAULT = Path("checkpoints/smollm2-135m-instruct")
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def write_model(base: Path, folder: Path) -> None:
    """A model of one tiny layer with the settings and the tokenizer of `base`."""
    torch.manual_seed(0)
    settings = folder.with_name("settings")
    settings.mkdir()
    for path in base.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (settings / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((base / "config.json").read_text()), **SIZE, **HEADS}
    (settings / "config.json").write_text(json.dumps(config))
    folder.mkdir()
    save_full(Decoder(DecoderConfig.from_folder(settings)), settings, folder)


def write_rows(path: Path, rows: int, words: int) -> None:
    """Short sums, each with a number of its own."""
    rng = random.Random(0)
    vocabulary = [
        "river",
        "of",
        "the",
        "Number",
        "seven",
        "carefully",
        "between",
        "a",
        "explained",
        "market",
        "and",
        "not",
    ]
    with open(path, "w") as file:
        for n in range(rows):
            a, b = rng.randrange(1000), rng.randrange(1000)
            more = "".join(f" {word}" for word in rng.choices(vocabulary, k=words))
            question = f"Case {n}: what is {a} + {b}?{more}"
            file.write(json.dumps({"question": question, "answer": f"{a} + {b} = {a + b}."}) + "\n")


def processes(root: int) -> list[int]:
    """A process and all that it has started."""
    found = [root]
    try:
        for task in Path(f"/proc/{root}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += processes(int(child))
    except OSError:
        pass  # it ended
    return found


def memory(process: int) -> tuple[int, int]:
    """Proportional set size of a process, and its anonymous part, in bytes."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", text))
    return int(found.get("Pss", 0)) << 10, int(found.get("Pss_Anon", 0)) << 10


def run(line: list[str], log: Path) -> dict:
    """A command with its cost; what it says goes to `log`, each line with the seconds and the peak so far."""
    begun, peak = time.perf_counter(), [0, 0]
    started = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while started.poll() is None:
            for at, size in enumerate(map(sum, zip(*map(memory, processes(started.pid)), strict=True))):
                peak[at] = max(peak[at], size)
            time.sleep(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with open(log, "w") as file:
        for said in started.stderr or ():
            file.write(f"{time.perf_counter() - begun:8.1f} s {peak[0] >> 20:5} MB | {said}")
            file.flush()
    started.wait()
    watcher.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if started.returncode:
        sys.exit(log.read_text())
    cpu, wall = used.ru_utime + used.ru_stime, time.perf_counter() - begun
    return {"cpu": cpu, "wall": wall, "peak_mb": peak[0] >> 20, "anonymous_mb": peak[1] >> 20}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=DEFAULT)
    flags.add_argument("--rows", type=int, default=4_000_000)
    flags.add_argument("--words", type=int, default=0)
    flags.add_argument("--folder", type=Path, help="where the files are made; default: a temporary folder")
    flags.add_argument("--audit", action="store_true", help="ptst.audit, which looks at a whole run")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of the command")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        here = Path(name)
        os.environ["PTST_HOME"] = str(here / "home")
        write_model(args.model, here / "model")
        write_rows(here / "rows.jsonl", args.rows, args.words)
        of_training = ["--max-steps", "1", "--out", str(here / "run")]
        command = ["ptst.audit", "--template", "vanilla"] if args.audit else ["ptst.train", *of_training]
        line = [sys.executable, "-m", *command, "--model", str(here / "model"), "--data", str(here / "rows.jsonl")]
        line += args.flags
        figures = {"rows": args.rows, **run(line, args.json.with_suffix(".log") if args.json else here / "log")}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
