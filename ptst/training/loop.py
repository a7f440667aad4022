"""The training loop: a function from a decoder and encoded examples to trained parameters.

The loss of an optimizer step is the sum over its trained tokens divided by their number in the whole step, however the
step is split into rows in memory and over ranks. The number is known on the host before the first row is computed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ptst.data.order import SourcePlan, Step, plan
from ptst.data.packing import Batch, rank_micro_batches, share_prefixes, to_batch
from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.model.loss import batch_loss
from ptst.text.encode import Example
from ptst.training.parallel import ALONE, World, sum_over_ranks
from ptst.training.schedule import Schedule, factor


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know; rates per step, lengths in tokens."""

    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 1e-4
    schedule: Schedule = "linear"
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm; 0: none
    examples_per_step: int = 8
    tokens_per_step: int | None = None
    micro_batch_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over all ranks: mean loss per trained token (nats), counts, and seconds."""

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
    # Of this rank's tokens, the share that was computed: the others stand in beginnings that documents share.
    computed: float = field(compare=False, default=1.0)
    group: list[int] = field(compare=False, repr=False, default_factory=list)  # indices of the examples


def steps(lengths: Sequence[int], config: LoopConfig, parts: Sequence[SourcePlan] = ()) -> list[Step]:
    """All steps of a run. `parts`: the sources of the examples, where there are several."""
    parts = parts or [SourcePlan(len(lengths), config.epochs)]
    return list(plan(lengths, parts, config.seed, config.examples_per_step, config.tokens_per_step, config.max_steps))


def adamw(parameters: Sequence[nn.Parameter], config: LoopConfig) -> AdamW:
    return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def train(
    decoder: Decoder,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    config: LoopConfig,
    on_step: Callable[[StepReport], None] = lambda _report: None,
    check: Callable[[Batch], None] = lambda _batch: None,
    *,
    parts: Sequence[SourcePlan] = (),
    optimizer: AdamW | None = None,
    done: int = 0,
    world: World = ALONE,
    where: Callable[[int], str] = "example {}".format,
) -> int:
    """Train `parameters` in place; returns the number of optimizer steps. `check` sees each batch, before its
    documents share prefixes.

    To go on after `done` steps, give parameters and optimizer as they were then. `world`: this rank's place; all ranks
    call with the same arguments otherwise. `where` names an example by its index, for messages.

    Raises UserError when there is nothing to train on, and when a loss or gradient is not finite: the step, the
    examples and the learning rate are named and the update is not applied.
    """
    if not examples:
        raise UserError("there is no example left to train on; see the counts of dropped examples")
    lengths = [len(e.ids) for e in examples]
    all_steps = steps(lengths, config, parts)
    total = len(all_steps)
    optimizer = optimizer or adamw(parameters, config)
    warmup = round(config.warmup * total)
    for step, planned in enumerate(islice(all_steps, done, None), done + 1):
        start = time.perf_counter()
        lr = config.lr * factor(config.schedule, step - 1, total, warmup, int(planned.epoch))
        for setting in optimizer.param_groups:
            setting["lr"] = lr
        chosen = [examples[i] for i in planned.examples]
        # The first token of a document is nobody's target.
        trained = sum(sum(e.loss_mask[1:]) for e in chosen)
        loss = torch.zeros((), dtype=torch.float64, device=decoder.device)
        tokens = computed = 0
        lengths_in_step = [len(e.ids) for e in chosen]
        for row in rank_micro_batches(lengths_in_step, config.micro_batch_tokens, world.rank, world.size):
            batch = to_batch([chosen[i] for i in row])
            check(batch)
            tokens += len(batch.tokens)
            if not decoder.lora_dropout:  # each document has a mask of its own, in its beginning too
                batch = share_prefixes(batch)
            decoder.dropout_seeds = [dropout_seed(config.seed, step, planned.examples[i]) for i in row]
            part = batch_loss(decoder, batch, trained)
            part.backward()
            computed += len(batch.tokens)
            loss += part.detach()
        decoder.dropout_seeds = None
        norm = _sum_gradients(parameters, loss, world, config.clip)
        mean_loss, grad_norm = torch.stack([loss, norm.to(loss)]).tolist()  # the step's only wait for the device
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            optimizer.zero_grad(set_to_none=True)
            culprits = [where(planned.examples[i]) for i in _not_finite(decoder, chosen, world)]
            raise UserError(
                f"step {step}: the loss is {mean_loss} and the norm of its gradient {grad_norm} at learning rate "
                f"{lr:g}, so the update was not applied; {_blame(culprits, [where(i) for i in planned.examples])}"
            )
        optimizer.step()
        # The fused optimizer does not tell that it has written, and whoever keeps copies of weights must know.
        torch.autograd.graph.increment_version(list(parameters))
        optimizer.zero_grad(set_to_none=True)
        report = StepReport(
            step=step,
            total=total,
            epoch=planned.epoch,
            loss=mean_loss,
            lr=lr,
            grad_norm=grad_norm,
            examples=len(chosen),
            tokens=sum(len(e.ids) for e in chosen),
            trained_tokens=trained,
            seconds=time.perf_counter() - start,
            computed=computed / tokens if tokens else 1.0,
            group=planned.examples,
        )
        on_step(report)
    return total


def dropout_seed(seed: int, step: int, example: int) -> int:
    """A document's dropout seed (31 bits): the mask depends on what is trained when, not on how a step is split."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}:{example}".encode(), digest_size=4).digest()) >> 1


def _sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor, world: World, clip: float) -> Tensor:
    """Gradients and loss summed over the ranks, the gradients then clipped; returns their norm before that."""
    if world.size > 1:
        for p in parameters:  # a rank without rows takes part all the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sum_over_ranks([loss.view(1), *(p.grad for p in parameters)], world)
    return nn.utils.clip_grad_norm_(parameters, clip or math.inf)


@torch.no_grad()
def _not_finite(decoder: Decoder, chosen: Sequence[Example], world: World) -> list[int]:
    """Which examples have, alone, a loss that is not finite."""
    bad = torch.zeros(len(chosen), device=decoder.device)
    for i in range(world.rank, len(chosen), world.size):
        bad[i] = float(not torch.isfinite(batch_loss(decoder, to_batch([chosen[i]]), 1.0)))
    sum_over_ranks([bad], world)
    return bad.nonzero().flatten().tolist()


def _blame(culprits: list[str], group: list[str]) -> str:
    """Which rows to look at, in words."""
    some = culprits or group
    named = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
    if not culprits:
        return f"no example's loss alone shows it; its examples are {named}; lower --lr"
    if len(culprits) == len(group) > 1:
        return f"so it is for every example of the step ({named}): the weights have diverged; lower --lr"
    return f"look at {named}, whose loss alone is not finite, or lower --lr"
