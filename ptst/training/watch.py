"""Training's watch: every micro-batch is checked and counted before it is computed, so that no row is lost, doubled or
exchanged between the data and the loss."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ptst.audit.account.document_check import DocumentCheck, example_hashes
from ptst.audit.account.gate import refuse
from ptst.audit.account.ledger import Ledger, LedgerSource
from ptst.audit.account.step_rule import StepRule
from ptst.audit.findings import Finding
from ptst.data.example_arrays import lengths_of, rows_of
from ptst.data.examples import Mixture
from ptst.data.order import Step
from ptst.data.step_batches import MicroBatch
from ptst.text.encode import Example
from ptst.text.segments import Conversation
from ptst.training.parallel import ALONE, World


class Watch:
    """Watches nothing. `begin_step`, `take` and `finish` may raise UserError."""

    def begin_step(self, number: int, epoch: float) -> None:
        """Before a step."""

    def take(self, batch: MicroBatch) -> None:
        """Before a micro-batch is computed."""

    def finish(self) -> None:
        """Before the last update of the weights."""


class LedgerWatch(Watch):
    """Keeps the ledger of a run, of this rank's share. Errors of rules in `allow` do not stop it.

    Raises UserError for steps that are not as the settings say."""

    def __init__(
        self, mixture: Mixture, steps: Sequence[Step], rule: StepRule, world: World = ALONE, allow: Iterable[str] = ()
    ):
        self._allowed, self._world = frozenset(allow), world
        self._total = len(steps)
        self._rows, self._lengths = rows_of(mixture.examples), lengths_of(mixture.examples)
        check = document_check(mixture.source.conversations, mixture.examples)
        sources = ledger_sources(mixture)
        self.ledger = Ledger(sources, rule, check, world.size, world.sum_all)
        planned = Ledger(sources, rule, check)
        self._replay(planned, steps)
        planned.finish()
        self._refuse(planned.findings)

    def resume(self, steps: Sequence[Step]) -> None:
        """Count the steps that an earlier process took, as they were planned: their batches are not built again."""
        self._replay(self.ledger, steps, self._world.is_main_process)
        if steps and len(steps) == self._total:  # only what follows training was left to do
            self.finish()

    def begin_step(self, number: int, epoch: float) -> None:
        self._refuse(self.ledger.begin_step(number, epoch))

    def take(self, batch: MicroBatch) -> None:
        if found := self.ledger.take(batch):
            self._refuse(found)

    def finish(self) -> None:
        self._refuse(self.ledger.finish())

    def account(self) -> list[dict[str, Any]]:
        """For each source, how often its examples were taken, and in which steps."""
        pairs = zip(self.ledger.sources, self.ledger.accounts, strict=True)
        return [{"name": source.name, **asdict(account)} for source, account in pairs]

    def _replay(self, ledger: Ledger, steps: Sequence[Step], counts: bool = True) -> None:
        for number, step in enumerate(steps, 1):
            chosen = step.examples if counts else []
            tokens = sum(self._lengths[i] for i in chosen)
            ledger.plan_step(number, step.epoch, [self._rows[i] for i in chosen], tokens)

    def _refuse(self, found: Sequence[Finding]) -> None:
        if found:
            number = self.ledger.step
            refuse([replace(f, cause=f.cause + f" (step {number})" * bool(number)) for f in found], self._allowed)


def document_check(conversations: Sequence[Conversation], examples: Sequence[Example]) -> DocumentCheck:
    """What the documents of these examples must be; the gate has compared the examples with their rows."""
    return DocumentCheck(conversations, example_hashes(examples))


def validation_check(
    conversations: Sequence[Conversation], examples: Sequence[Example], allow: Iterable[str]
) -> Callable[[MicroBatch], None]:
    """A check of every micro-batch of a validation set; it raises UserError."""
    check, allowed = document_check(conversations, examples), frozenset(allow)
    return lambda batch: refuse(check.check(batch), allowed)


def ledger_sources(mixture: Mixture) -> list[LedgerSource]:
    """The sources of a mixture as the ledger counts them."""
    sources, first = list[LedgerSource](), 0
    rows = np.array(rows_of(mixture.examples), np.int64)
    for record, plan in zip(mixture.records, mixture.plans, strict=True):
        own = array("q", np.sort(rows[(rows >= first) & (rows < first + record.rows)]).tobytes())
        sources.append(LedgerSource(record.name, record.epochs or plan.epochs, first, record.rows, own))
        first += record.rows
    return sources
