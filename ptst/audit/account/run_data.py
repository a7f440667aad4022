"""What the audit checks: the data of a run, encoded as training does, and the optimizer steps that take them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from ptst.audit.account.step_rule import StepRule
from ptst.audit.findings import Finding
from ptst.audit.setup import Setup
from ptst.data import order
from ptst.data.example_arrays import lengths_of
from ptst.data.examples import Mixture, TrainingSource, mix
from ptst.data.order import Step
from ptst.data.sources import Source
from ptst.data.step_batches import MicroBatch, StepBatches
from ptst.errors import UserError

NO_LIMIT = 10**9  # tokens


@dataclass(frozen=True)
class RunData:
    """`training`: each source, the main one first. `unreadable`: errors of rows that could not be read,
    a list for each source and one more for the validation set. `found_in_files`: what is wrong with the rows, compared
    with their files."""

    training: Sequence[TrainingSource]
    validation: Source | None = None
    rule: StepRule = field(default_factory=StepRule)
    unreadable: Sequence[Sequence[UserError]] = ()
    found_in_files: Sequence[Finding] = ()

    @classmethod
    def of(cls, source: Source, micro_batch_tokens: int, unreadable: Iterable[UserError] = ()) -> Self:
        """One pass over a single source."""
        return cls([TrainingSource(source)], rule=StepRule(micro_batch_tokens), unreadable=[list(unreadable)])


@dataclass(frozen=True)
class Encoded:
    """Encoded data and the steps that take them. `bad`: errors of rows that cannot be trained on, by index into the
    mixture's rows. `steps`: of a validation set, one that takes all."""

    mixture: Mixture
    bad: dict[int, UserError]
    rule: StepRule
    steps: list[Step]
    is_training: bool = True

    @classmethod
    def training(cls, data: RunData, setup: Setup) -> Self:
        """The training data with the run's own plan."""
        bad: dict[int, UserError] = {}
        mixture = _mix(data.training, setup, bad)
        return cls(mixture, bad, data.rule, plan_steps(mixture, data.rule))

    @classmethod
    def validation(cls, source: Source, setup: Setup, micro_batch_tokens: int) -> Self:
        """The validation set as one step, as `validation_loss` computes it."""
        bad: dict[int, UserError] = {}
        mixture = _mix([TrainingSource(source)], setup, bad)
        size = len(mixture.examples)
        steps = [Step(0.0, list(range(size)))] if size else []
        return cls(mixture, bad, StepRule(micro_batch_tokens, max(1, size)), steps, is_training=False)

    def batches(self, step: Step) -> Iterator[MicroBatch]:
        """The micro-batches of a step, as training builds them."""
        return iter(StepBatches(self.mixture.examples, step.examples, self.rule.micro_batch_tokens))

    def left(self) -> Step:
        """All examples that no step takes: max_steps, or a fraction of an epoch, ends before them."""
        taken = {i for step in self.steps for i in step.examples}
        return Step(0.0, [i for i in range(len(self.mixture.examples)) if i not in taken])


def plan_steps(mixture: Mixture, rule: StepRule) -> list[Step]:
    """The steps of a run over these examples."""
    sizes = rule.examples_per_step, rule.tokens_per_step, rule.max_steps, rule.phases
    return list(order.plan(lengths_of(mixture.examples), mixture.plans, order.seed_of(rule.order, rule.seed), *sizes))


def _mix(sources: Sequence[TrainingSource], setup: Setup, bad: dict[int, UserError]) -> Mixture:
    limit = setup.max_length or NO_LIMIT
    return mix(sources, setup.prompt_format, limit, setup.too_long, setup.train_on, bad)
