"""The trainer: an iterator over optimizer steps.

    trainer = Trainer(decoder, parameters, examples, TrainerConfig(lr=1e-4))
    for report in trainer:
        print(report.step, report.loss)

The loss of an optimizer step is the sum over its trained tokens divided by their number in the whole step, however the
step is split into micro-batches and over ranks. The number is known on the host before the first micro-batch is
computed, so that nothing waits for the device but the report of the step.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ptst.data.example_arrays import lengths_of
from ptst.data.order import SourcePlan, Step, plan, seed_of
from ptst.data.packing import to_batch
from ptst.data.step_batches import StepBatches
from ptst.data.steps import Steps
from ptst.errors import Setting, UserError, Words
from ptst.model.decoder import Decoder
from ptst.model.loss import batch_loss, constrained_loss
from ptst.model.sharded_weights import Rows
from ptst.text.encode import Example
from ptst.training.average import PREFIX as AVERAGE
from ptst.training.average import Average
from ptst.training.constraint import TokenConstraint
from ptst.training.parallel import ALONE, World, sum_over_ranks
from ptst.training.proximal import PREFIX as ANCHOR
from ptst.training.proximal import Anchor
from ptst.training.safeguards import ProximalSettings
from ptst.training.schedule import PassSettings, StepSettings, factor
from ptst.training.sharding import ShardedMasters, idle_loss, idle_passes, masters_of
from ptst.training.watch import Watch


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(PassSettings, ProximalSettings):
    """What the trainer needs to know. `seed`: of the order of examples and of dropout."""

    micro_batch_tokens: int = 2048
    seed: int = 0

    @classmethod
    def of(cls, settings: StepSettings, **changes: Any) -> Self:
        """What a command's settings say of these; `changes` win."""
        fields = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in vars(settings).items() if k in fields} | changes)

    def plan(self, lengths: Sequence[int], sources: Sequence[SourcePlan] = ()) -> Steps:
        """All steps of a run over examples of these lengths. `sources`: where they are from, if from several."""
        sources = sources or [SourcePlan(len(lengths), self.epochs)]
        sizes = self.examples_per_step, self.tokens_per_step, self.max_steps
        return Steps(plan(lengths, sources, seed_of(self.order, self.seed), *sizes, self.phases))


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over all ranks: mean loss per trained token (nats), counts, and seconds. `objective`: what the
    step made smaller, where that is another number than the loss (a token constraint, a proximal term). `computed`: the
    share of this rank's tokens that was computed, the others being in prefixes that documents share. `group`: indices
    of the examples."""

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    examples: int
    tokens: int
    trained_tokens: int
    seconds: float = field(compare=False)
    computed: float = field(compare=False, default=1.0)
    group: list[int] = field(compare=False, repr=False, default_factory=list)
    objective: float | None = None

    @property
    def last(self) -> bool:
        return self.step == self.total


class Trainer:
    """Trains `parameters` (by name, all of the decoder's that require a gradient) in place, a step at a time.

    `sources`: where the examples are from, if from several. `world`: this process's rank; all ranks must take the
    same steps. `average`: decay of a running average of the weights, kept in `trainer.average`.

    Raises UserError when there is nothing to train on, and in a step whose loss or gradient is not finite: step,
    examples and learning rate are named, and the update is not applied.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameters: Mapping[str, nn.Parameter],
        examples: Sequence[Example],
        config: TrainerConfig,
        sources: Sequence[SourcePlan] = (),
        world: World = ALONE,
        average: float | None = None,
    ):
        if not examples:
            raise UserError("there is no example left to train on", "see the counts of dropped examples")
        self.decoder, self.parameters, self.examples, self.config = decoder, parameters, examples, config
        self.world = world
        self.steps = config.plan(lengths_of(examples), sources)
        self.masters = masters_of(decoder, parameters, config.weight_update, config.seed, world)
        masters = list(self.masters.weights.values())
        self.optimizer = AdamW(masters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.average = None if average is None else Average(self.masters.tensors, average, self.masters.write)
        self.anchor = Anchor(self.masters, config.proximal) if config.proximal else None
        self.constraint: TokenConstraint | None = None
        """Holds the tokens of answers near a reference model's, if set."""
        self.done = 0
        """Steps taken so far; a checkpoint that is loaded sets it."""
        self.watch = Watch()
        """Sees every step and micro-batch before it is computed; may raise."""
        self.name_example: Callable[[int], str] = "example {}".format
        """Names an example by its index, for messages."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides the optimizer's state."""
        return {
            **self.masters.tensors,
            **(self.average.copies if self.average else {}),
            **(self.anchor.copies if self.anchor else {}),
        }

    @property
    def rows(self) -> Mapping[str, Rows]:
        """Which rows of them this rank keeps; none are named where weights are not spread over ranks."""
        own = self.masters.rows if isinstance(self.masters, ShardedMasters) else {}
        keys = {name: name.removeprefix(AVERAGE).removeprefix(ANCHOR) for name in self.tensors}
        return {name: own[key] for name, key in keys.items() if key in own}

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are what is evaluated and kept: their average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepReport]:
        while self.done < len(self.steps):
            yield self.step()

    def step(self) -> StepReport:
        """Take the next optimizer step."""
        start = time.perf_counter()
        planned, number = self.steps[self.done], self.done + 1
        lr = self._set_learning_rate(planned)
        chosen = [self.examples[i] for i in planned.examples]
        trained = sum(sum(e.loss_mask[1:]) for e in chosen)  # nothing predicts the first token of a document
        self.watch.begin_step(number, planned.epoch)
        if self.anchor is not None and self.done and planned.turn != self.steps[self.done - 1].turn:
            self.anchor.move()
        losses, computed = self._backward(planned, trained)
        if number == len(self.steps):
            self.watch.finish()
        norm = self._sum_gradients(losses)
        # The step's only wait for the device.
        mean_loss, objective, grad_norm = torch.cat([losses, norm.to(losses).view(1)]).tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(planned, f"the loss is {mean_loss} and the norm of its gradient {grad_norm}", lr)
        self.masters.step(self.optimizer, number)
        # The fused optimizer writes without raising the version, which caches of converted weights compare.
        torch.autograd.graph.increment_version(list(self.masters.written))
        self.optimizer.zero_grad(set_to_none=True)
        self.done = number
        if self.average is not None:
            self.average.update(number)
        return StepReport(
            step=number,
            total=len(self.steps),
            epoch=planned.epoch,
            loss=mean_loss,
            lr=lr,
            grad_norm=grad_norm,
            examples=len(chosen),
            tokens=sum(len(e.ids) for e in chosen),
            trained_tokens=trained,
            seconds=time.perf_counter() - start,
            computed=computed,
            group=planned.examples,
            objective=objective if self.constraint or self.anchor else None,
        )

    def _set_learning_rate(self, planned: Step) -> float:
        c, total = self.config, len(self.steps)
        lr = c.lr * factor(c.schedule, self.done, total, round(c.warmup * total), int(planned.epoch))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _backward(self, planned: Step, trained: int) -> tuple[Tensor, float]:
        """Accumulate the gradient of this rank's micro-batches. Returns their loss with what is made smaller, (2,), and
        the share of their tokens that was computed."""
        decoder, config = self.decoder, self.config
        losses = torch.zeros(2, dtype=torch.float64, device=decoder.device)
        tokens = computed = 0
        place = config.micro_batch_tokens, self.world.rank, self.world.size
        share = not decoder.lora_dropout  # under dropout each document has a mask of its own, in its prefix too
        for batch in StepBatches(self.examples, planned.examples, *place, share, self.watch.take):
            decoder.dropout_seeds = [dropout_seed(config.seed, self.done + 1, i) for i in batch.examples]
            if self.constraint is None:
                loss = objective = batch_loss(decoder, batch.computed, trained)
            else:
                held = self.constraint.of(batch.examples, decoder.device)
                objective, loss = constrained_loss(decoder, batch.computed, trained, *held)
            objective.backward()
            tokens += len(batch.whole.tokens)
            computed += len(batch.computed.tokens)
            losses += torch.stack([loss.detach(), objective.detach()])
        decoder.dropout_seeds = None
        lengths = [len(self.examples[i].ids) for i in planned.examples]
        for _ in range(idle_passes(decoder, lengths, config.micro_batch_tokens, self.world)):
            idle_loss(decoder).backward()
        return losses, computed / tokens if tokens else 1.0

    def _sum_gradients(self, losses: Tensor) -> Tensor:
        """Sum gradients and losses over the ranks, add the anchor's pull, then clip the gradients; returns their norm
        before clipping."""
        clip = self.config.clip or math.inf
        if isinstance(self.masters, ShardedMasters):
            return self.masters.sum_gradients(losses, self.anchor.pull if self.anchor else None, clip)
        parameters = list(self.masters.weights.values())
        if self.world.size > 1:
            for p in parameters:  # a rank without a micro-batch takes part all the same
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            sum_over_ranks([losses, *(p.grad for p in parameters if p.grad is not None)], self.world)
        if self.anchor is not None:
            losses[1] += self.anchor.pull()
        return nn.utils.clip_grad_norm_(parameters, clip)

    @torch.no_grad()
    def _not_finite(self, planned: Step, what: str, lr: float) -> UserError:
        """The error for a step that cannot be taken, naming the examples whose loss alone is not finite."""
        bad = torch.zeros(len(planned.examples), device=self.decoder.device)
        for at in range(0, len(bad), self.world.size):
            if (i := at + self.world.rank) < len(bad):
                alone = to_batch([self.examples[planned.examples[i]]])
                bad[i] = float(not torch.isfinite(batch_loss(self.decoder, alone, 1.0)))
            elif self.decoder.sharded:
                idle_loss(self.decoder)
        sum_over_ranks([bad], self.world)
        names = [self.name_example(i) for i in planned.examples]
        culprits = [names[i] for i in bad.nonzero().flatten().tolist()]
        some = culprits or names
        listed = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
        lower: Words = ("lower ", Setting("lr"))
        if not culprits:
            remedy: Words = (f"no example's loss alone shows it; its examples are {listed}; ", *lower)
        elif len(culprits) == len(names) > 1:
            remedy = (f"so it is for every example of the step ({listed}): the weights have diverged; ", *lower)
        else:
            remedy = (f"look at {listed}, whose loss alone is not finite, or ", *lower)
        return UserError(
            f"{what} at learning rate {lr:g}, so the update was not applied", remedy, f"step {self.done + 1}"
        )


def dropout_seed(seed: int, step: int, example: int) -> int:
    """A document's dropout seed (31 bits): the mask depends on what is trained when, not on how a step is split."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}:{example}".encode(), digest_size=4).digest()) >> 1
