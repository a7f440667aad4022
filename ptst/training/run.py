"""One training run in its folder: the loop, with looks at validation data, states saved and loaded, and signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptst.data.mix import Mixture
from ptst.data.packing import Batch
from ptst.errors import UserError
from ptst.model.decoder import Decoder
from ptst.progress import ProgressLine, say
from ptst.text.encode import Example
from ptst.training import checkpoint
from ptst.training.evaluate import Samples, validation_loss
from ptst.training.interrupt import Interrupt
from ptst.training.loop import LoopConfig, StepReport, adamw, steps, train
from ptst.training.metrics import Metrics, model_flops, sizes, truncate_logs
from ptst.training.parallel import World


class Interrupted(Exception):
    """A signal came; the step was finished and saved. `exit_code` is the shell's: 128 + the signal."""

    def __init__(self, step: int, number: int, out: Path):
        super().__init__(f"stopped after step {step}, which is saved")
        self.out = out
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Keeping:
    """Every how many steps a run is looked at and saved (`eval_every` None: at its beginning and end alone), how many
    of the last states are kept (the best one is besides), and whether TensorBoard gets the figures."""

    eval_every: int | None = None
    save_every: int = 50
    keep: int = 2
    tensorboard: bool = False


def fit(
    decoder: Decoder,
    weights: Mapping[str, nn.Parameter],
    mixture: Mixture,
    loop: LoopConfig,
    out: Path,
    world: World,
    keeping: Keeping,
    validation: Sequence[Example] = (),
    samples: Samples | None = None,
    check: Callable[[Batch], None] = lambda _batch: None,
    on_step: Callable[[int], None] = lambda _step: None,
) -> dict[str, Any]:
    """Train `weights` in place, from the newest whole state in `out` if it has one. `on_step(number)` is called after
    each step, on the first rank, before its state is saved: once more for a step that a kill took back.

    Returns the number of steps, and of the validation losses the one before, after, and the best with its step. Raises
    Interrupted after a signal, ValueError as `train`, OSError when a state cannot be written.
    """
    states = out / "state"
    optimizer = adamw(list(weights.values()), loop)
    found = None
    if world.first:
        checkpoint.clean(states)
        found = checkpoint.newest_state(states, say)
    done = int(world.sum(int(found.name.removeprefix("step-")) if found else 0))
    notes: dict[str, Any] = {}
    if done:
        notes = checkpoint.load_state(states / f"step-{done:08d}", weights, optimizer)
        say(f"going on after step {done}")
    if world.first:
        truncate_logs(out, notes.get("sizes", {}))
    losses: dict[str, Any] = notes.get("losses", {"before": None, "after": None, "best": None, "best_step": None})
    total = len(steps([len(e.ids) for e in mixture.examples], loop, mixture.plans))
    full = all(p.requires_grad for p in decoder.parameters())

    def flops(report: StepReport) -> float:
        lengths = [len(mixture.examples[i].ids) for i in report.group]
        return model_flops(decoder.config, lengths, report.trained_tokens, full, report.computed)

    line = ProgressLine("train", total, first=done) if world.first else nullcontext()
    with Interrupt() as interrupt, line as progress:
        metrics = Metrics(out, progress, flops, world.size, keeping.tensorboard, done) if world.first else None

        def look(step: int) -> float | None:
            start = time.perf_counter()
            loss = validation_loss(decoder, validation, loop.micro_batch_tokens, world) if validation else None
            if loss is not None and not math.isfinite(loss):
                raise UserError(
                    f"after step {step} the validation loss is {loss}; lower --lr, or look at the validation data"
                )
            if metrics is not None:
                answers = samples.answers(decoder) if samples else []
                metrics.evaluation(step, loss, answers, time.perf_counter() - start)
            if loss is not None and keeping.eval_every:
                say(f"after step {step}: validation loss {loss:.4f}")
            return loss

        def save(step: int, epoch: float, loss: float | None) -> None:
            kept = {"epoch": epoch, "losses": losses, "validation_loss": loss, "sizes": sizes(out)}
            try:
                checkpoint.save_state(states, step, weights, optimizer, kept, keeping.keep)
            except OSError as error:
                whole = checkpoint.list_states(states)
                raise OSError(
                    f"saving after step {step} failed ({error}); the last whole state is "
                    f"{whole[-1] if whole else 'the beginning'}; make room, then go on with --resume {out}"
                ) from None

        def after(report: StepReport) -> None:
            step, last, loss = report.step, report.step == report.total, None
            if metrics is not None:
                metrics.step(report)
                on_step(step)
            if last or (keeping.eval_every and step % keeping.eval_every == 0):
                loss = look(step)
            losses["after"] = loss
            better = loss is not None and (losses["best"] is None or loss < losses["best"])
            if better:
                losses.update(best=loss, best_step=step)
            signal = interrupt.agreed(world)
            if world.first and (better or last or signal or step % keeping.save_every == 0):
                save(step, report.epoch, loss)
            if signal and not last:
                raise Interrupted(step, signal, out)

        if not done:
            losses["before"] = look(0)
        train(
            decoder,
            list(weights.values()),
            mixture.examples,
            loop,
            after,
            check,
            parts=mixture.plans,
            optimizer=optimizer,
            done=done,
            world=world,
            where=lambda i: mixture.source.conversations[mixture.examples[i].row].source,
        )
    return {"steps": total, **losses}
