"""Everything that wants a GPU, most important first, each part within its seconds: is it right, how fast is it.

    python benchmarks/gpu_all.py --stage check --out benchmarks/results/h200     is it right: tests, sanitizer, waits
    python benchmarks/gpu_all.py --stage speed --out benchmarks/results/h200     how fast: kernels, decoding, training
    python benchmarks/gpu_all.py --stage tune --out benchmarks/results/h200      block shapes, and attention with them
    python benchmarks/gpu_all.py --stage peers --out benchmarks/results/h200     the same beside other libraries

benchmarks/first_gpu.sh runs the first three. Each part is a process group of its own, which is ended as a whole when
its seconds are over, so that nothing goes on computing beside the parts after it. Output goes to OUT/<part>.log as it
comes, results to files that are replaced after each row: a run that is cut off leaves what it has measured.
OUT/summary-<stages>.json says of each part how it ended (`passed`, `failed`, `cut off`, `no time left`, or `not there`:
the tool that it runs under is missing) and how long it took. Exit code 1 unless all have passed or were not there: a
missing tool is no failure, but what it would have checked is not checked, and the last line says so.

Without a GPU this is a dry run: every part at a tiny shape, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ON_GPU, machine, write_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("check", "speed", "tune", "peers")
ENDS = ("passed", "failed", "cut off", "no time left", "not there")
HARMLESS = ("passed", "not there")
GRACE = 5.0  # seconds between asking a group to end and ending it
ON_GPU_ALONE = ["tests/generation/test_on_gpu.py", "tests/training/test_on_gpu.py"]
TESTS = ["tests/kernels", "tests/model/test_fused.py", "tests/model/test_fold.py", *ON_GPU_ALONE]
TUNED = ("attention", "prefill")
# What a dry run takes of the tests for a GPU, at small shapes; the ordinary suite has the others.
ONE_OF_EACH = "128256 or (test_attention and 4-1-100-64 and lengths0) or 4096 and lora or test_on_gpu or R0 or norm_and"
ONE_OF_EACH += " or (test_prefill and 8-2-None-64)"


@dataclass(frozen=True)
class Part:
    """A command line, `python` left out unless `program` is another; seconds on a GPU (a dry run has one limit)."""

    line: list[str]
    seconds: float
    program: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)


def tests(out: Path, jobs: int) -> Part:
    """No -x: the first tolerance that a GPU misses must not hide the others. All processes share a cache of compiled
    kernels, so that they compile them at once."""
    line = ["-m", "pytest", "-q", "-o", "addopts=", "-m", "not exhaustive and not thorough", "-p", "no:cacheprovider"]
    line += ["--junitxml", str(out / "tests.xml"), "-ra"]
    line += ["-n", str(jobs)] if ON_GPU and importlib.util.find_spec("xdist") else []
    if ON_GPU:
        return Part([*line, *TESTS], 120)
    return Part(
        [*line, "tests/kernels/test_gpu_shapes.py", *ON_GPU_ALONE, "-k", ONE_OF_EACH],
        120,
        environment={"PTST_GPU_TESTS": "small"},
    )


def sanitizer(tool: str) -> Part:
    """One launch of each kernel at a small shape, under NVIDIA's checker of memory or of races between threads."""
    line = ["benchmarks/kernels_alone.py", "--once", "--small"]
    return Part(["--tool", tool, "--error-exitcode", "1", sys.executable, *line], 30, "compute-sanitizer")


def parts(stage: str, out: Path, jobs: int) -> dict[str, Part]:
    """Parts by name, in order of importance."""

    def script(name: str, *flags: str, to: str = "", seconds: float) -> Part:
        return Part([f"benchmarks/{name}.py", *flags, *(["--out", str(out / to)] if to else [])], seconds)

    def within(seconds: float, name: str, *flags: str, to: str) -> Part:
        """It begins nothing new when four fifths of its seconds are over."""
        return script(name, *flags, "--seconds", str(0.8 * seconds), to=to, seconds=seconds)

    def alone(kind: str, seconds: float) -> Part:
        return within(seconds, "kernels_alone", "--only", kind, to=f"alone-{kind}.json")

    def peers(kind: str) -> Part:
        return within(300, "kernels", "--only", kind, to=f"kernels-{kind}")

    if stage == "check":
        return {
            "machine": Part(["benchmarks/measure.py", str(out / "machine.json")], 20),
            "compile": script("kernels_alone", "--once", "--jobs", str(jobs), seconds=60),
            "tests": tests(out, jobs),
            "waits": script("gpu_syncs", to="waits.json", seconds=40),
            "memcheck": sanitizer("memcheck"),
            "racecheck": sanitizer("racecheck"),
        }
    if stage == "speed":
        ncu = ["--launch-count", "6", "--target-processes", "all", "--csv", "--section", "SpeedOfLight"]
        ncu += ["--section", "WarpStateStats", sys.executable, "benchmarks/kernels_alone.py", "--once"]
        profile = ["--profile", str(out / "profile")]
        return {
            "attention": alone("attention", 80),
            "thin": alone("thin", 40),
            "loss": alone("loss", 30),
            "decode": alone("decode", 30),
            "prefill": alone("prefill", 20),
            "decode-step": within(70, "decode_step", to="decode-step.json"),
            "train": within(110, "train_gpu", *profile, to="train"),
            "ncu": Part([*ncu, "--only", "attention"], 30, "ncu"),
        }
    if stage == "tune":
        # Llama's and Qwen's heads. Each pass is kept as soon as it is found. A dry run has nothing to choose between.
        tune = ["-m", "ptst.tune_kernels", "--head-dims", "128", "--groups", "4", "1"]
        runs = ["-m", "pytest", "-q", "-n", "0", "tests/kernels/test_flash_blocks.py", "-k", "what_is_timed_is_right"]
        again = {kind: within(80, "kernels_alone", "--only", kind, to=f"tuned-{kind}.json") for kind in TUNED}
        return {"tune": Part(tune if ON_GPU else runs, 300), **{f"tuned-{kind}": part for kind, part in again.items()}}
    kinds = ("attention", "loss", "elementwise", "lora", "decode")
    train = within(600, "train_gpu", "--peers", to="train-peers")
    return {**{f"peers-{kind}": peers(kind) for kind in kinds}, "peers-train": train}


def end(process: subprocess.Popen) -> None:
    """End the whole group of a process, whether or not that one has ended itself."""
    for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        limit = time.monotonic() + grace
        while time.monotonic() < limit:
            process.poll()  # so that it is no zombie, which would count as alive
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)


def run(name: str, part: Part, out: Path, seconds: float) -> dict[str, object]:
    """How one part `ended`, one of ENDS; its output is in a file, its process group is ended after `seconds`."""
    if shutil.which(part.program) is None:
        return {"part": name, "ended": "not there", "why": f"{part.program} is missing"}
    if seconds < 1:
        return {"part": name, "ended": "no time left"}
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [part.program, *part.line], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | part.environment,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            ended = {"ended": "passed"} if code == 0 else {"ended": "failed", "why": f"exit code {code}"}
        except subprocess.TimeoutExpired:
            ended = {"ended": "cut off", "why": "by the time limit"}
        finally:
            end(process)
    return {"part": name, **ended, "seconds": round(time.monotonic() - start, 1)}


def summary(done: list[dict[str, object]]) -> tuple[str, int]:
    """The last line, which names every part that has not passed, and the exit code."""
    parts = [f"{number} {end}" for end in ENDS if (number := sum(d["ended"] == end for d in done))]
    others = [f"{d['part']}: {d['ended']}" + (f" ({d['why']})" if "why" in d else "") for d in done]
    named = [told for told, d in zip(others, done, strict=True) if d["ended"] != "passed"]
    return "; ".join([", ".join(parts), *named]), int(any(d["ended"] not in HARMLESS for d in done))


def stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # so that the part that runs is ended


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--stage", choices=STAGES, nargs="+", default=["check", "speed", "tune"])
    flags.add_argument("--minutes", type=float, default=60.0, help="of all parts together")
    flags.add_argument("--only", nargs="+", help="these parts alone")
    flags.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile at once")
    args = flags.parse_args()
    out = args.out.resolve()
    known = {name: part for stage in args.stage for name, part in parts(stage, out, args.jobs).items()}
    for name in args.only or ():
        if name not in known:
            flags.error(f"there is no part {name!r}; choose from {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    last = time.monotonic() + 60 * args.minutes
    done: list[dict[str, object]] = []
    for name, part in known.items():
        if args.only and name not in args.only:
            continue
        seconds = part.seconds if ON_GPU else 300.0
        done.append(run(name, part, out, min(seconds, last - time.monotonic())))
        print(done[-1], flush=True)
        write_json(out / f"summary-{'-'.join(args.stage)}.json", machine() | {"dry_run": not ON_GPU, "parts": done})
    last_line, code = summary(done)
    print(last_line)
    sys.exit(code)


if __name__ == "__main__":
    main()
