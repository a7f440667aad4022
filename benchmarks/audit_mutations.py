"""Which faults of our own pipeline the audit finds: 100 of them are planted, one at a time, between file and loss.

    python benchmarks/audit_mutations.py            # all, with a table and a total
    python benchmarks/audit_mutations.py -k packing # those whose module or function has this in its name
    python benchmarks/audit_mutations.py -v         # with the findings
    python benchmarks/audit_mutations.py --sample 9 # 9 of them

A fault is an exact fragment of a function's source and what takes its place (`audit_mutations.txt`). The function
of the running program gets the changed code; then the data sets of `audit_mutations_inputs.py` are audited as a user
would. A fault is found if an audit has a finding that it does not have without the fault, or stops with an error. One
that changes neither findings nor any token, label, position or boundary that training or a test prompt would see
changes nothing, and does not count. Exit code 1 below 97 in 100 found. Each fault has a process of its own.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import io
import multiprocessing
import multiprocessing.pool
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are forked

from benchmarks.audit_mutations_inputs import SCENARIOS, write_inputs
from ptst.audit.account.run_data import Encoded, RunData, StepRule
from ptst.audit.config import AuditConfig
from ptst.audit.report import _settings, audit_data
from ptst.audit.setup import Setup
from ptst.data.examples import length_limit
from ptst.data.packing import Batch
from ptst.errors import UserError
from ptst.model.config import DecoderConfig
from ptst.text.prompt_format import open_prompt_format, with_roles
from ptst.text.templates import find_template
from ptst.training.run_sources import mix_templates, read_main, read_others

WANTED = 0.97
TOLD = ("found", "stopped", "crashed", "endless")
TABLE = Path(__file__).with_name("audit_mutations.txt")
# What no other fault changes and takes a process of its own to compute: the renderings of chat templates.
_TEMPLATES = ("chat_template", "probes", "derive", "detect", "owner_check", "laws")


SECONDS = 60  # of CPU time for one fault; more is an endless loop


class _Endless(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _Endless


class NoSuchFragment(Exception):
    """The source has changed since the table was written."""


@dataclass(frozen=True)
class Mutation:
    """`new` for `old` in the source of a function (`Class.method`), or as the value of a constant."""

    module: str
    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def apply(self) -> None:
        """Change the running program. Raises NoSuchFragment."""
        module = importlib.import_module(f"ptst.{self.module}")
        if not self.old:
            self._set(module)
        else:
            function, changed = self.fit(module)
            function.__code__ = changed
        _forget(self.module)

    def fit(self, module: ModuleType) -> tuple[FunctionType, CodeType]:
        """The function, and its code with the fault. Raises NoSuchFragment."""
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        first, last = _lines_of(source, self.name, self)
        lines = source.split("\n")
        body = "\n".join(lines[first:last])
        if self.old not in body:
            raise NoSuchFragment(f"{self}: {self.old!r} is not in its source any more")
        lines[first:last] = body.replace(self.old, self.new, 1).split("\n")
        code = compile("\n".join(lines), module.__file__ or "", "exec", dont_inherit=True)
        function = _function(module, self.name)
        (changed,) = [c for c in _codes(code) if c.co_qualname == self.name]
        if changed.co_freevars != function.__code__.co_freevars:
            raise NoSuchFragment(f"{self}: the fault changes what the function closes over")
        return function, changed

    def _set(self, module: ModuleType) -> None:
        """A constant, or a field of one (`FORMATS['llama2'].closing`), wherever it was imported."""
        owner, dot, attribute = self.name.rpartition(".")
        value = eval(self.new, vars(module))
        if dot:
            object.__setattr__(eval(owner, vars(module)), attribute, value)
            return
        before = vars(module)[self.name]
        for other in [m for n, m in sys.modules.items() if n.startswith("ptst.") and not n.startswith("ptst.audit.")]:
            if vars(other).get(self.name) is before:
                setattr(other, self.name, value)


def _lines_of(source: str, name: str, mutation: Mutation) -> tuple[int, int]:
    """The lines of a function, from 0, without its decorators."""
    nodes: Any = ast.parse(source).body
    node: Any = None
    for part in name.split("."):
        node = next((n for n in nodes if getattr(n, "name", None) == part), None)
        if node is None:
            raise NoSuchFragment(f"{mutation}: there is no {name} any more")
        nodes = node.body
    return node.lineno - 1, node.end_lineno


def _function(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType):
        inner = ("__wrapped__", "fget", "func", "__func__")
        found = next(getattr(found, a) for a in inner if getattr(found, a, None) is not None)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _forget(module: str) -> None:
    """Empty all caches, but those of chat templates where the fault is elsewhere."""
    for name, loaded in list(sys.modules.items()):
        if name.startswith("ptst") and (module.endswith(_TEMPLATES) or not name.endswith(_TEMPLATES)):
            for value in list(vars(loaded).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


Found = tuple[str, ...]  # rule, level, row, token, cause


def audits() -> Iterator[tuple[str, Counter[Found]]]:
    """The findings of every scenario's audit, one after another."""
    for name, given in SCENARIOS.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                report = audit_data(AuditConfig(**{"epochs": 1.0, **given}))
                found = [(f.rule, f.level, f.row, str(f.token), f.cause) for f in report.findings]
            except UserError as error:
                found = [("stopped", "error", "", "", str(error))]
            except Exception as error:
                found = [("crashed", "error", "", "", f"{type(error).__name__}: {error}")]
        yield name, Counter(found)


def all_seen() -> dict[str, str]:
    """What training and tests would see in every scenario."""
    seen = {}
    for name, given in SCENARIOS.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                seen[name] = what_is_seen(AuditConfig(**{"epochs": 1.0, **given}))
            except Exception as error:
                seen[name] = f"{type(error).__name__}: {error}"
    return seen


def what_is_seen(config: AuditConfig) -> str:
    """A digest of every micro-batch of every step, of the validation set's, and of all test prompts."""
    settings = _settings(config, None)
    errors: list[list[UserError]] = [[]]
    read = read_others(settings, read_main(settings, errors[0]), errors)
    source, folder = read.training[0].source, Path(settings.model)
    shape = DecoderConfig.from_folder(folder)
    template, *mixed = find_template(settings.template), *mix_templates(settings.mix)
    named = with_roles(template, *mixed), settings.template_family or source.family, settings.chat_format
    prompt_format = open_prompt_format(folder, *named, vocab_size=shape.vocab_size, allow_chat_template=True)
    prompt_format = replace(prompt_format.with_template(template), allow_role_markers=True)
    test = replace(prompt_format, template=find_template(config.test_template or settings.template))
    limit = length_limit(settings.max_length, shape.max_positions, settings.micro_batch_tokens)
    setup = Setup(prompt_format, settings.train_on, limit, settings.too_long)
    size = settings.micro_batch_tokens if isinstance(settings.micro_batch_tokens, int) else 2048
    rule = StepRule(size, settings.examples_per_step, settings.tokens_per_step, settings.max_steps, settings.seed)
    data = RunData(read.training, read.validation, rule, errors)
    digest = hashlib.sha256()
    parts = [Encoded.training(data, setup)]
    parts += [Encoded.validation(read.validation, setup, size)] if read.validation else []
    for part in parts:
        for step in part.steps:
            for batch in part.batches(step):
                digest.update(repr([*documents(batch.whole)]).encode() + repr([*documents(batch.computed)]).encode())
        for conversation in part.mixture.source.conversations:
            with contextlib.suppress(UserError):
                digest.update(repr(test.encode(conversation.prompt()).ids).encode())
    return digest.hexdigest()


def documents(batch: Batch) -> Iterator[tuple[list[int], list[int], list[tuple[int, int]]]]:
    """Each document's tokens and positions, with its shared prefix, and its labels without those that are ignored."""
    shared = batch.shared_prefixes or [(0, 0)] * len(batch.rows)
    for (start, end), (at, size) in zip(pairwise(batch.cu_seqlens), shared, strict=True):
        places = [*range(at, at + size), *range(start, end)]
        labels = enumerate(batch.labels[start:end], start)
        trained = [(label, batch.position_ids[i]) for i, label in labels if label >= 0]
        yield [batch.tokens[i] for i in places], [batch.position_ids[i] for i in places], trained


@dataclass(frozen=True)
class Clean:
    """Findings and what is seen without a fault, by scenario."""

    findings: dict[str, Counter[Found]]
    seen: dict[str, str]


@dataclass(frozen=True)
class Result:
    mutation: Mutation
    verdict: str  # found, stopped, crashed, endless, changes nothing, MISSED
    what: list[str]
    seconds: float


def judge(mutation: Mutation, clean: Clean) -> Result:
    """Plant a fault in this process, and audit until it is found."""
    started = time.process_time()
    signal.signal(signal.SIGVTALRM, _stop)
    verdict, what = "changes nothing", list[str]()
    try:
        mutation.apply()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        for scenario, findings in audits():
            if new := [*(findings - clean.findings[scenario])]:
                rules = Counter(rule for rule, *_ in new)
                verdict = next(iter(rules)) if rules.keys() <= {"stopped", "crashed"} else "found"
                what = [", ".join(rules), *(f"{scenario}: {rule} {row}: {cause}" for rule, _, row, _, cause in new)]
                break
        else:
            seen = all_seen()
            if what := [s for s in SCENARIOS if seen[s] != clean.seen[s]]:
                verdict, what = "MISSED", ["; ".join(what)]
    except NoSuchFragment as error:
        verdict, what = "no such fragment", [str(error)]
    except _Endless:
        verdict = "endless"
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return Result(mutation, verdict, what, time.process_time() - started)


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, computed in a forked process, whose changes end with it."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        theirs.send(work(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.join()


def all_mutations(word: str = "") -> list[Mutation]:
    """The table, or those of it whose function has a word in its name."""
    found: list[Mutation] = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        mark, text = line[:2], line[2:].replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
        if mark == "- ":
            found[-1] = replace(found[-1], old=text)
        elif mark in ("+ ", "= "):
            found[-1] = replace(found[-1], new=text)
        elif line and not line.startswith("#"):
            module, _, name = line.partition(" ")
            found.append(Mutation(module, name, "", ""))
    return [m for m in found if word in str(m)]


def run_mutations(
    mutations: list[Mutation], folder: Path, jobs: int = 1, say: Callable[[Result], None] | None = None
) -> list[Result]:
    """Plant each fault in a process of its own, `jobs` at a time."""
    write_inputs(folder)
    os.chdir(folder)
    clean = Clean(dict(audits()), all_seen())  # and warms what no fault changes
    gc.freeze()  # forked processes share it
    results: list[Result] = []
    with multiprocessing.pool.ThreadPool(jobs) as pool:
        for result in pool.imap(lambda m: in_a_process(judge, m, clean) or Result(m, "crashed", [], 0.0), mutations):
            results.append(result)
            if say:
                say(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-k", "--word", default="", help="only faults whose function has this in its name")
    parser.add_argument("--sample", type=int, help="so many of them, evenly spread")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the findings")
    options = parser.parse_args()
    mutations = all_mutations(options.word)
    if options.sample:
        mutations = mutations[:: max(1, len(mutations) // options.sample)][: options.sample]
    print("| function | the fault | result | by |\n|---|---|---|---|")

    def say(r: Result) -> None:
        m = r.mutation
        change = f"`{m.old}` -> `{m.new}`" if m.old else f"= `{m.new}`"
        change = change.replace("\n", " ").replace("|", "\\|")
        print(f"| `{m}` | {change} | {r.verdict} | {r.what[0] if r.what else ''} |", flush=True)
        if options.verbose:
            print(*(f"    {line[:300]}" for line in r.what[1:8]), sep="\n")

    with tempfile.TemporaryDirectory() as folder:
        results = run_mutations(mutations, Path(folder), options.jobs, say)
    verdicts = Counter(r.verdict for r in results)
    told = sum(verdicts[v] for v in TOLD)
    counted = len(results) - verdicts["changes nothing"]
    seconds = sum(r.seconds for r in results)
    print(f"\n{told} of {counted} faults found ({dict(verdicts)}), {seconds:.0f} s of CPU time")
    return int(told < WANTED * counted or verdicts["no such fragment"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
