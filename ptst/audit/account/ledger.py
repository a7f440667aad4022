"""The ledger: every row of every source, from the data to the optimizer steps that train it.

It takes each micro-batch and counts its documents. What a run must do is known here from its settings alone, without
the code that plans it:

    an epoch        takes every example of the main source once, in a new shuffle, or as the data have them where
                    that is asked for; the last may be a fraction
    other sources   are taken ceil(epochs * examples) times in all, spread evenly over the main source's examples and
                    pass after pass, so that no example is an epoch ahead of another
    a step          has `examples_per_step` examples, or at most `tokens_per_step` tokens; the last of an epoch the rest
    phases          where they are asked for, the other sources are not spread: their steps take turns with the main
                    source's (turns.py)

With several ranks each has a ledger of its own share; at an epoch's end `merge` adds up what they counted.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ptst.audit.account.by_row import StepsByRow
from ptst.audit.account.document_check import DocumentCheck
from ptst.audit.account.order import is_clustered, is_in_turn, is_repeated, is_sorted
from ptst.audit.account.step_rule import StepRule
from ptst.audit.account.turns import Turns
from ptst.audit.findings import Finding
from ptst.data.step_batches import MicroBatch

PACK = 4096  # tokens: of what a step of `tokens_per_step` is made
WINDOW = 256  # examples among which one is searched that fits into a pack
PACKED = 0.8  # how alike orders of packs must be to be no shuffle: which example fills a pack depends on its length
ADDED = 1 << 19  # numbers that ranks add up at once
LEAST_FILL = 0.3  # of tokens_per_step, in the mean of an epoch's steps


@dataclass(frozen=True)
class LedgerSource:
    """A source: its rows begin at index `first` of all rows; `examples` are the indices of those to be trained on."""

    name: str
    epochs: float
    first: int
    rows: int
    examples: Sequence[int]

    def visits_by(self, share: float) -> tuple[int, int]:
        """How often its examples are taken, at least and at most, when this share of the run is over."""
        every = self.epochs * len(self.examples)
        least, most = math.ceil(every - 1e-9), math.ceil(every)
        return (least, most) if share >= 1 else (math.floor(least * share) - 1, math.floor(most * share) + 1)


@dataclass
class Account:
    """How often a source's examples were taken in all, in how many steps, and in which first and last."""

    visits: int = 0
    steps: int = 0
    first_step: int | None = None
    last_step: int | None = None


class Epoch:
    """What was counted in one epoch. By row: how often it was taken, and the sum of the steps that took it. By step:
    its tokens, its examples of each source, and where the plan saw it."""

    def __init__(self, first_step: int, rows: int):
        self.first_step = first_step
        self.counts, self.steps = array("i", bytes(4 * rows)), array("q", bytes(8 * rows))
        self.tokens: list[int] = []
        self.sizes: list[list[int]] = []
        self.told: list[float] = []

    def merge(self, add: Callable[[list[int]], list[int]]) -> None:
        """Add what other ranks counted."""
        self.counts, self.steps = (_added(own, add) for own in (self.counts, self.steps))
        merged = iter(add([*self.tokens, *(n for sizes in self.sizes for n in sizes)]))
        self.tokens = [next(merged) for _ in self.tokens]
        self.sizes = [[next(merged) for _ in sizes] for sizes in self.sizes]


def _added(own: array, add: Callable[[list[int]], list[int]]) -> array:
    """Numbers added up over the ranks, some at a time: as lists they take five times their memory."""
    found = array(own.typecode)
    for at in range(0, len(own), ADDED):
        found.extend(add(own[at : at + ADDED].tolist()))
    return found


@dataclass
class Ledger:
    """Takes every micro-batch of a run: `begin_step`, then `take` for each of its micro-batches; `finish` after the
    last. `check`: what the documents must be. `ranks`, `merge`: adds up lists of numbers over the ranks. `steps_of`:
    the steps that took each row, where they are kept. `findings`: what was found so far."""

    sources: Sequence[LedgerSource]
    rule: StepRule
    check: DocumentCheck
    ranks: int = 1
    merge: Callable[[list[int]], list[int]] = list
    steps_of: StepsByRow | None = None
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_rows = sum(source.rows for source in self.sources)
        self.accounts = [Account() for _ in self.sources]
        self.taken = array("i", bytes(4 * self.num_rows))
        """How often each row was taken in the epochs that are over."""
        self.step = self.epoch = 0
        self._starts = [source.first for source in self.sources]
        self._now = Epoch(1, self.num_rows)
        self._before: Epoch | None = None
        self._told_twice: set[int] = set()
        self._open = -1  # tokens of this step's newest micro-batch
        self._long = 0  # documents longer than a pack
        due = [source.visits_by(1)[0] for source in self.sources]
        self._turns = Turns(self.rule.phases, (sum(due[1:]), due[0])) if self.rule.phases else None

    def begin_step(self, number: int, epoch: float) -> list[Finding]:
        """The next step, and the epoch in which the plan sees it; a new one ends the epoch before, and what was wrong
        with that is returned."""
        known = len(self.findings)
        if number != self.step + 1:
            self._find("steps", f"step {number} follows step {self.step}")
        if self.step and int(epoch) != self.epoch:
            self._end_epoch()
            if int(epoch) != self.epoch + 1:
                self._find("steps", f"epoch {int(epoch) + 1} follows epoch {self.epoch + 1}", f"step {number}")
            self.epoch, self._now = int(epoch), Epoch(number, self.num_rows)
        self.step, self._open = number, -1
        self._now.tokens.append(0)
        self._now.sizes.append([0] * len(self.sources))
        self._now.told.append(epoch)
        return self.findings[known:]

    def take(self, batch: MicroBatch) -> list[Finding]:
        """Check and count a micro-batch of this step; returns what is wrong with it."""
        whole, limit = batch.whole, self.rule.micro_batch_tokens
        found, tokens = self.check.check(batch), len(whole.tokens)
        cause = ""
        if tokens > limit and len(whole.rows) > 1:
            cause = f"{len(whole.rows)} documents of {tokens} tokens, the limit is {limit}"
        elif self.ranks == 1 and 0 <= self._open <= limit - tokens:
            cause = f"micro-batches of {self._open} and {tokens} tokens fit into one of {limit}"
        if cause:
            place = self.check.place(whole.rows[0]) if whole.rows else "batch"
            found.append(Finding("micro-batch", place, f"step {self.step}: {cause}"))
        self._open = tokens
        if self.rule.tokens_per_step is not None:
            pack = min(PACK, self.rule.tokens_per_step)
            self._long += sum(b - a > pack for a, b in zip(whole.cu_seqlens, whole.cu_seqlens[1:], strict=False))
        self._now.tokens[-1] += tokens
        found += self.count(whole.rows)
        self.findings += found
        return found

    def count(self, rows: Sequence[int]) -> list[Finding]:
        """Count rows in this step; returns those of the main source that this epoch had already."""
        now, step, found = self._now, self.step, []
        for row in rows:
            if not 0 <= row < self.num_rows:
                continue  # a finding says so
            if now.counts[row] and row < self.sources[0].rows and row not in self._told_twice:
                self._told_twice.add(row)
                cause = f"in steps {now.steps[row]} and {step}" if now.steps[row] != step else f"twice in step {step}"
                found.append(self._twice(row, cause))
            now.counts[row] += 1
            now.steps[row] += step
            now.sizes[-1][bisect_right(self._starts, row) - 1] += 1
            if self.steps_of is not None:
                self.steps_of.add(row, step)
        return found

    def plan_step(self, number: int, epoch: float, rows: Sequence[int], tokens: int) -> None:
        """Count a step by its rows alone, as a plan has it."""
        self.begin_step(number, epoch)
        self._now.tokens[-1] += tokens
        self.findings += self.count(rows)

    def finish(self) -> list[Finding]:
        """After the last step: checks the last epoch, and whether all was taken. Returns what it finds."""
        known = len(self.findings)
        if self.step:
            self._end_epoch(last=True)
        if self.rule.max_steps is not None and self.step > self.rule.max_steps:
            self._find("steps", f"{self.step} steps, the limit is {self.rule.max_steps}")
        for source, account in zip(self.sources, self.accounts, strict=True):
            (least, most), size = source.visits_by(1), len(source.examples)
            taken = f"{size} examples were taken {account.visits} times"
            if account.visits > most or (account.visits < least and not self._stopped):
                self._find("visits", f"{taken}, {least} are due in {source.epochs:g} epochs", source.name)
            elif size and (account.visits < least or account.visits % size):
                self._find("part-of-epoch", f"{taken}: {account.visits / size:.4g} epochs", source.name)
        if self._long:
            self._find("longer-than-pack", f"{self._long} documents have more than {PACK} tokens, or than a step")
        return self.findings[known:]

    @property
    def _stopped(self) -> bool:
        """Whether max_steps ends the run."""
        return self.rule.max_steps is not None and self.step >= self.rule.max_steps

    def _end_epoch(self, last: bool = False) -> None:
        now = self._now
        now.merge(self.merge)
        self.findings += self._check_rows(now, last)
        self.findings += self._check_steps(now, last and self._stopped)
        self.findings += self._check_order(now)
        self.taken = array("i", (np.array(self.taken) + np.array(now.counts)).tobytes())
        for number, account in enumerate(self.accounts):
            account.visits += sum(sizes[number] for sizes in now.sizes)
            took = [step for step, sizes in enumerate(now.sizes, now.first_step) if sizes[number]]
            if took:
                account.steps += len(took)
                account.first_step, account.last_step = account.first_step or took[0], took[-1]
        self.findings += self._check_others(last and self._stopped)
        self._before, self._told_twice = now, set()

    def _check_rows(self, now: Epoch, last: bool) -> Iterator[Finding]:
        """Every example of the main source once. A last epoch may end early: it is a fraction, or max_steps ends it."""
        main, epoch = self.sources[0], self.epoch + 1
        for row in range(main.rows):
            if now.counts[row] > 1 and row not in self._told_twice:
                yield self._twice(row, f"{now.counts[row]} times in epoch {epoch}")
        due = main.visits_by(1)[0] - sum(self.taken[: main.rows])
        if last and (self._stopped or due < len(main.examples)):
            return
        for row in main.examples:
            if not now.counts[row]:
                cause = f"in no batch of epoch {epoch}, steps {now.first_step} to {self.step}"
                yield Finding("not-trained", self.check.place(row), cause)

    def _check_steps(self, now: Epoch, stopped: bool) -> Iterator[Finding]:
        """The sizes of an epoch's steps, and what the plan says of its progress."""
        rule, sizes = self.rule, [sum(own) for own in now.sizes]
        share, before, every = min(1.0, self.sources[0].epochs - self.epoch), 0, sum(sizes)
        last_main = max((number for number, own in enumerate(now.sizes) if own[0]), default=-1)
        for number, (size, tokens, told) in enumerate(zip(sizes, now.tokens, now.told, strict=True)):
            step, rest = now.first_step + number, number + 1 == len(sizes)
            causes = ["no example"] if not size else []
            if self._turns is not None and size:
                cause, ends = self._turns.take(now.sizes[number])
                causes += [cause] if cause else []
                rest = ends or number == last_main
            if rule.tokens_per_step is not None:
                if tokens > rule.tokens_per_step and size > 1:
                    causes.append(f"{size} examples of {tokens} tokens, the limit is {rule.tokens_per_step}")
            elif size > rule.examples_per_step or (size < rule.examples_per_step and not rest):
                causes.append(f"{size} examples instead of {rule.examples_per_step}")
            if not stopped and every and abs(told - (self.epoch + share * before / every)) > 1e-6:
                causes.append(f"the plan is at epoch {told:g}, after {before} of the {every} examples of an epoch")
            yield from (Finding("steps", f"step {step}", cause) for cause in causes)
            before += size
        if rule.tokens_per_step is not None and len(sizes) > 2:
            mean = sum(now.tokens[:-1]) / (len(now.tokens) - 1)
            if mean < LEAST_FILL * rule.tokens_per_step:
                cause = f"{mean:.0f} tokens a step in epoch {self.epoch + 1}, at most {rule.tokens_per_step} are asked"
                yield Finding("steps", "", cause)

    def _check_others(self, stopped: bool) -> Iterator[Finding]:
        """Sources that are mixed in: spread over the run, unless they take turns with the main one, and no example
        ahead of another. An epoch's stretch of them is shuffled, so that nothing can be said of a part of one."""
        if stopped:
            return
        share = self.accounts[0].visits / max(1, self.sources[0].visits_by(1)[0])
        for source, account in zip(self.sources[1:], self.accounts[1:], strict=True):
            least, most = source.visits_by(share)
            if share < 1 and self._turns is None and not least <= account.visits <= most:
                cause = f"taken {account.visits} times by the end of epoch {self.epoch + 1}, {least + 1} are due"
                yield Finding("visits", source.name, cause)
            over, begun = divmod(account.visits, max(1, len(source.examples)))
            for row in source.examples:
                times, passes = self.taken[row], f"{over} whole passes over {source.name}"
                if times > over + (begun > 0):
                    yield self._twice(row, f"{times} times in {passes}")
                elif times < over:
                    yield Finding("not-trained", self.check.place(row), f"{times} times in {passes}")

    def _check_order(self, now: Epoch) -> Iterator[Finding]:
        """A shuffle, another one in every epoch, or the order of the data; with the other sources spread over it."""
        least, epoch, before = PACKED if self.rule.tokens_per_step else 0.0, self.epoch + 1, self._before
        counts, in_steps = np.array(now.counts), np.array(now.steps)
        every = in_steps[counts == 1]
        for number, source in enumerate(self.sources):
            rows = np.array(source.examples, np.int64)
            rows = rows[counts[rows] == 1]
            steps = in_steps[rows]
            if self.rule.order == "file":
                if not self._in_turn(number, steps):
                    cause = f"epoch {epoch} does not take the rows as they come in the data"
                    yield Finding("order", source.name, cause)
            elif is_sorted(steps, least):
                yield Finding("order", source.name, f"epoch {epoch} takes the rows as they come in the data")
            if number and self._turns is None and is_clustered(steps, every, least):
                yield Finding("order", source.name, f"its examples are all in one part of epoch {epoch}")
            if not number and before is not None and self.rule.order == "random":
                both = rows[np.array(before.counts)[rows] == 1]
                if is_repeated(np.array(before.steps)[both], in_steps[both], least):
                    yield Finding("order", source.name, f"epochs {epoch - 1} and {epoch} have the same order")

    def _in_turn(self, number: int, steps: np.ndarray) -> bool:
        """Whether an epoch's stretch of a source is in the order of the data. Where that of another source begins is
        not to be seen if some of its rows wait for a pack."""
        if self.rule.tokens_per_step is not None:
            return number > 0 or is_in_turn(steps, WINDOW - 1)
        return is_in_turn(steps, wraps=number > 0)

    def _twice(self, row: int, cause: str) -> Finding:
        return Finding("trained-twice", self.check.place(row), cause)

    def _find(self, rule: str, cause: str, row: str = "") -> None:
        self.findings.append(Finding(rule, row, cause))
