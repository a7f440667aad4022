"""The training loop: a function from a decoder and encoded examples to trained parameters.

The loss of an optimizer step is the sum over its trained tokens divided by their number in the whole step, however the
step is split into rows in memory.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptst.data.packing import Batch, pack, steps
from ptst.model.decoder import Decoder
from ptst.model.likelihood import batch_loss
from ptst.text.encode import Encoded
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
    micro_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss per trained token (nats), counts, and seconds."""

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float


def plan(lengths: Sequence[int], config: LoopConfig) -> Iterator[tuple[float, list[int]]]:
    """(epochs done, example indices) of every step: a new seeded shuffle each epoch, the last partial step included."""
    rng = random.Random(config.seed)
    want = math.ceil(config.epochs * len(lengths))
    done = taken = 0
    while taken < want:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        order = order[: want - taken]
        for group in steps(
            lengths, order, examples_per_step=config.examples_per_step, tokens_per_step=config.tokens_per_step
        ):
            if done == config.max_steps:
                return
            yield taken / len(lengths), group
            taken += len(group)
            done += 1


def train(
    decoder: Decoder,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Encoded],
    config: LoopConfig,
    on_step: Callable[[StepReport], None] = lambda _report: None,
    check: Callable[[Batch], None] = lambda _batch: None,
) -> int:
    """Train `parameters` in place; returns the number of optimizer steps. `check` sees each batch before the loss does.

    Raises ValueError when there is nothing to train on, and when a loss is not finite: the step is named and its
    update is not applied.
    """
    if not examples:
        raise ValueError("there is no example left to train on; see the counts of dropped examples")
    lengths = [len(e.ids) for e in examples]
    total = sum(1 for _ in plan(lengths, config))
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    warmup = round(config.warmup * total)
    for step, (epoch, group) in enumerate(plan(lengths, config)):
        start = time.perf_counter()
        lr = config.lr * factor(config.schedule, step, total, warmup, int(epoch))
        for setting in optimizer.param_groups:
            setting["lr"] = lr
        batches = pack([examples[i] for i in group], config.micro_tokens)
        trained = sum(b.num_trained for b in batches)
        loss = 0.0
        for batch in batches:
            check(batch)
            part = batch_loss(decoder, batch, trained)
            part.backward()
            loss += float(part.detach())
        norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"step {step + 1}: the loss is {loss} and its gradient {float(norm)}, so the update was not applied; "
                f"look at examples {group} or lower --lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        tokens = sum(lengths[i] for i in group)
        on_step(StepReport(step + 1, total, epoch, loss, lr, float(norm), tokens, trained, seconds))
    return total
