"""What a run records as it goes: metrics.jsonl, samples.jsonl, the progress line, the loggers.

What differs between two equal runs by nature (times, speed, memory) is under the key `time`.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptst import storage
from ptst.model.config import DecoderConfig
from ptst.progress import ProgressLine, say
from ptst.system_memory import peak_resident_memory
from ptst.threads import SlowDown
from ptst.training.loggers import Loggers
from ptst.training.trainer import StepReport, Trainer

FILES = ("metrics.jsonl", "samples.jsonl")
# Dense bf16 FLOP/s as the makers state them.
_PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def model_flops(
    config: DecoderConfig, lengths: Sequence[int], trained_tokens: int, full: bool, computed: float = 1.0
) -> float:
    """FLOPs of training on documents of these lengths, 2 per multiply-add: products forward and backward (with a
    gradient of the weights only if `full`), attention at its exact triangle, the head on trained tokens only. The
    embedding look-up, the adapters and what is computed twice are not counted. `computed`: the share of the tokens that
    goes through the products, where documents share prefixes."""
    c = config
    kv = c.num_kv_heads * c.head_dim
    per_layer = c.hidden_size * (2 * c.num_heads * c.head_dim + 2 * kv + 3 * c.intermediate_size)
    products = c.num_layers * per_layer * sum(lengths) * computed + c.vocab_size * c.hidden_size * trained_tokens
    pairs = sum(
        n * (n + 1) / 2 if w is None or n <= w else n * w - w * (w - 1) / 2
        for w in map(c.window, range(c.num_layers))
        for n in lengths
    )
    attention = 4 * c.num_heads * c.head_dim * pairs
    return (6 if full else 4) * products + 3.5 * attention


def peak_flops() -> float | None:
    """This GPU's dense bf16 FLOP/s, or None where there is no GPU or it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in _PEAK.items() if key in name), None)


def peak_memory() -> int:
    """Most bytes held so far: of the GPU where there is one, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_memory()


def truncate_logs(folder: Path, sizes: dict[str, int]) -> None:
    """Truncate metrics.jsonl and samples.jsonl to the sizes they had at a checkpoint (0 where it does not name them).

    One that is shorter lost rows: that is said, and it goes on from its last whole row. Raises UserError where one is a
    symbolic link.
    """
    for name in FILES:
        path, size = folder / name, sizes.get(name, 0)
        storage.refuse_link(path)
        have = path.stat().st_size if path.exists() else 0
        if have < size:
            say(
                f"warning: {path} has {have} bytes, fewer than the {size} it had when the checkpoint was saved: rows "
                "of earlier steps are missing; the run goes on, and so does the log"
            )
            size = path.read_bytes().rfind(b"\n") + 1 if have else 0
        if have > size:
            with open(path, "rb+") as file:
                file.truncate(size)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of metrics.jsonl and samples.jsonl, which are synced to disk first."""
    found = {}
    for name in FILES:
        if (folder / name).exists():
            storage.sync(folder / name)
            found[name] = (folder / name).stat().st_size
    return found


class Metrics:
    """The metrics of a trainer, from where it is now."""

    def __init__(self, folder: Path, progress: ProgressLine, trainer: Trainer, loggers: Loggers):
        self.folder, self.progress, self.trainer = folder, progress, trainer
        self.full = all(p.requires_grad for p in trainer.decoder.parameters())
        self.peak = (peak_flops() or 0.0) * trainer.world.size
        self.smooth: float | None = None
        self.slow_down = SlowDown()
        self.began, self.first = time.monotonic(), trainer.done
        self.loggers = loggers

    def step(self, report: StepReport) -> None:
        """Record an optimizer step."""
        seconds = report.seconds
        self.slow_down.took(self.trainer.decoder.device, round(report.computed * report.tokens), seconds)
        lengths = [len(self.trainer.examples[i].ids) for i in report.group]
        flops = model_flops(self.trainer.decoder.config, lengths, report.trained_tokens, self.full, report.computed)
        times: dict[str, Any] = {
            "seconds": seconds,
            "tokens_per_second": report.tokens / seconds,
            "computed": report.computed,
            "mfu": flops / seconds / self.peak if self.peak else None,
            "peak_memory": peak_memory(),
            "eta": (time.monotonic() - self.began) / (report.step - self.first) * (report.total - report.step),
        }
        row = dataclasses.asdict(report)
        del row["seconds"], row["computed"], row["group"]
        if report.objective is None:
            del row["objective"]
        self._add({"kind": "step", **row, "time": times})
        self.smooth = report.loss if self.smooth is None else 0.9 * self.smooth + 0.1 * report.loss
        mfu = f"  MFU {times['mfu']:.0%}" if self.peak else ""
        self.progress.update(
            report.step,
            f"loss {self.smooth:.3f}  lr {report.lr:.2e}  norm {report.grad_norm:.2f}  {report.trained_tokens} trained"
            f"  {times['tokens_per_second']:.0f} tokens/s{mfu}  {times['peak_memory'] / 2**30:.1f} GiB",
        )

    def evaluation(self, step: int, loss: float | None, samples: list[dict[str, Any]], seconds: float) -> None:
        """Record the validation loss and sample answers of the weights after `step`."""
        for sample in samples:
            storage.append_jsonl(self.folder / "samples.jsonl", {"step": step, **sample})
        if loss is not None:
            self._add({"kind": "eval", "step": step, "validation_loss": loss, "time": {"seconds": seconds}})

    def _add(self, row: dict[str, Any]) -> None:
        storage.append_jsonl(self.folder / "metrics.jsonl", row)
        self.loggers.add(row)
