"""Do the kernels' tests see a mistake? Plants those of kernel_mutations.txt one at a time in a copy, and runs tests.

    python benchmarks/kernel_mutations.py                 all of them; exits with 1 if one survives or fits no more
    python benchmarks/kernel_mutations.py -k _dkdv -v     those whose file, function or words have this; tests' output

A mistake is killed if the tests that its entry names fail. Some no interpreter can show (a missing barrier, a copy that
is read too early): their entries name the test that sees them on a GPU, and without one they are listed as such. An
entry whose fragment is not in the source any more is an error: it must be given anew, not dropped.
"""

from __future__ import annotations

import argparse
import ast
import io
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("kernel_mutations.txt")
COPIED = ("kernels", "ptst", "tests", "benchmarks", "pyproject.toml")


class NoSuchFragment(Exception):
    """The source has changed since the table was written."""


@dataclass(frozen=True)
class Mutation:
    """`new` for every `old` in a function of the one file that `files` (a pattern) has it in; `function` "": in the
    whole file. `tests`: arguments of pytest; `on_gpu`: whether they see it on a GPU alone."""

    files: str
    function: str
    what: str
    old: str = ""
    new: str = ""
    tests: str = ""
    on_gpu: bool = False

    def __str__(self) -> str:
        return f"{self.files} {self.function or '(file)'}: {self.what}"

    def find(self, root: Path) -> tuple[Path, str]:
        """The file and its changed text. Raises NoSuchFragment."""
        found = []
        for path in sorted(root.glob(self.files)):
            text = path.read_text(encoding="utf-8")
            first, last = _span(text, self.function)
            lines = text.splitlines(keepends=True)
            body = "".join(lines[first:last])
            if self.old in body:
                lines[first:last] = [body.replace(self.old, self.new)]
                found.append((path, "".join(lines)))
        if len(found) != 1:
            raise NoSuchFragment(f"{self}: {self.old!r} is in {len(found)} files, not in one")
        return found[0]


def _span(text: str, function: str) -> tuple[int, int]:
    """The lines of a function (`Class.method`) from 0, with its decorators; an empty span where it does not exist."""
    if not function:
        return 0, len(text.splitlines())
    nodes: list = _parsed(text).body
    node = None
    for part in function.split("."):
        node = next((n for n in nodes if getattr(n, "name", None) == part), None)
        if node is None:
            return 0, 0
        nodes = node.body
    assert node is not None
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno


@lru_cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def all_mutations(word: str = "") -> list[Mutation]:
    """The table, or those of it that have a word in file, function or description."""
    found: list[Mutation] = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        mark, text = line[:2], line[2:].replace("\\n", "\n")
        if mark == "- ":
            found[-1] = replace(found[-1], old=text)
        elif mark in ("+ ", "+"):
            found[-1] = replace(found[-1], new=text)
        elif mark in ("t ", "g "):
            found[-1] = replace(found[-1], tests=text, on_gpu=mark == "g ")
        elif line and not line.startswith("#"):
            place, _, what = line.partition(": ")
            files, _, function = place.partition(" ")
            found.append(Mutation(files, function, what))
    return [m for m in found if word in str(m)]


@dataclass(frozen=True)
class Result:
    mutation: Mutation
    verdict: str  # killed, survived, seen on a GPU alone, no such fragment, no such test
    output: str
    seconds: float


def copy_of_the_code(folder: Path) -> Path:
    """Everything that the tests need, for mistakes to be planted in."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)  # ptst/kernels leads to the copy
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def judge(mutation: Mutation, copy: Path, on_gpu: bool) -> Result:
    """Plant a mistake in the copy, run its tests in a forked process, and mend it again."""
    start = time.monotonic()
    try:
        path, changed = mutation.find(copy)
    except NoSuchFragment as error:
        return Result(mutation, "no such fragment", str(error), 0.0)
    if mutation.on_gpu and not on_gpu:
        return Result(mutation, "seen on a GPU alone", mutation.tests, 0.0)
    before = path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    try:
        code, output = _tested(copy, mutation.tests)
    finally:
        path.write_text(before, encoding="utf-8")
    verdict = {0: "survived", 1: "killed"}.get(code, "no such test")
    return Result(mutation, verdict, output, time.monotonic() - start)


def _tested(copy: Path, tests: str) -> tuple[int, str]:
    """(pytest's exit code, what it printed). In a fork of this process, which has imported what takes long."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(copy, tests, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:  # it died
        return 1, "the process ended"
    finally:
        process.join()


def _run(copy: Path, tests: str, answer) -> None:
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    sys.dont_write_bytecode = True  # a file of the same size and second would pass for unchanged
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not exhaustive"]
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        code = int(pytest.main([*options, *shlex.split(tests)]))
    answer.send((code, output.getvalue()[-4000:]))


def run_mutations(mutations: list[Mutation]) -> Iterator[Result]:
    """One after another."""
    # NVML answers whether there is a GPU without opening it, which no fork could use afterwards.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    import hypothesis  # noqa: F401
    import numba  # noqa: F401
    import pytest  # noqa: F401
    import triton  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_code(Path(folder))
        for mutation in mutations:
            yield judge(mutation, copy, on_gpu)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", "--word", default="", help="only mistakes with this in file, function or description")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what the tests say")
    options = parser.parse_args()
    results = []
    for result in run_mutations(all_mutations(options.word)):
        results.append(result)
        print(f"{result.verdict:20} {result.mutation} ({result.seconds:.1f} s)", flush=True)
        if options.verbose or result.verdict in ("no such test", "no such fragment", "seen on a GPU alone"):
            print(result.output)
    verdicts = Counter(r.verdict for r in results)
    print(f"\n{dict(verdicts)}")
    return int(sum(verdicts.values()) != verdicts["killed"] + verdicts["seen on a GPU alone"] or not results)


if __name__ == "__main__":
    raise SystemExit(main())
