"""Everything that wants a GPU, most important first, within a time limit: tests, then every benchmark.

    python benchmarks/gpu_all.py --out benchmarks/results/h200 [--minutes 8]

Each part is a process of its own whose output goes to OUT/<part>.log as it comes, so that a run that is cut off leaves
what it has measured. OUT/summary.json says of each part whether it ran, how it ended and how long it took. Without a
GPU the same parts run at their small shapes, which shows that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json

ROOT = Path(__file__).resolve().parents[1]


def parts(out: Path) -> dict[str, list[str]]:
    """Command lines by name, in order of importance."""

    def kernels(*names: str) -> list[str]:
        return ["benchmarks/kernels.py", "--only", *names, "--out", str(out / f"kernels-{names[0]}")]

    return {
        "tests": ["-m", "pytest", "tests/kernels", "-q", "-x"],
        "attention": kernels("attention"),
        "loss": kernels("loss"),
        "train": ["benchmarks/train_gpu.py", "--peers", "--out", str(out / "train")],
        "elementwise": kernels("elementwise"),
        "lora": kernels("lora"),
        "decode": kernels("decode"),
    }


def run(name: str, line: list[str], out: Path, seconds: float) -> dict[str, object]:
    """One part, its output in a file, killed when the time is over."""
    if seconds < 1:
        return {"part": name, "ended": "left out for want of time"}
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(
                [sys.executable, *line], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            ended = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "cut off by the time limit"
    return {"part": name, "ended": ended, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--minutes", type=float, default=8.0)
    flags.add_argument("--only", nargs="+", help="these parts alone")
    args = flags.parse_args()
    out = args.out.resolve()
    known = parts(out)
    for name in args.only or ():
        if name not in known:
            flags.error(f"there is no part {name!r}; choose from {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    done: list[dict[str, object]] = []
    for name, line in known.items():
        if args.only and name not in args.only:
            continue
        done.append(run(name, line, out, end - time.monotonic()))
        print(done[-1], flush=True)
        write_json(out / "summary.json", machine() | {"parts": done})
    sys.exit(any(d["ended"] != "passed" for d in done))


if __name__ == "__main__":
    main()
