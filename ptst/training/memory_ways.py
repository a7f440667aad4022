"""Which ways of training a model fit the memory of this machine, by their plans."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.quantized import has_library
from ptst.system_memory import free_memory
from ptst.training.memory import SHARE, Method, gigabytes, plan_memory


@dataclass(frozen=True)
class Way:
    """A way to train: settings in words and as they are set, its expected peak in bytes, and whether it fits."""

    name: str
    settings: Mapping[str, Any]
    peak: int
    fits: bool


def ways(
    config: DecoderConfig, method: Method, micro_batch_tokens: int, largest: int | None = None, free: int | None = None
) -> list[Way]:
    """All weights, and LoRA over a base as it is, in int8 and in nf4; each also with activation checkpointing. Dtype,
    adapter and micro-batches are those of the run, whose `method` is one of them; without an adapter, LoRA's defaults.
    `free`: bytes, those of the machine by default."""
    free = free_memory(method.device) if free is None else free
    lora = method.lora or LoraConfig()
    dtype = str(method.dtype).removeprefix("torch.")
    found = []
    for name, full, quantize in (
        (f"all weights, {dtype}", True, "none"),
        (f"LoRA, {dtype}", False, "none"),
        ("LoRA, base in int8", False, "int8"),
        ("LoRA, base in nf4", False, "nf4"),
    ):
        for again in (False, True):
            way = replace(method, lora=None if full else lora, quantize=quantize, activation_checkpointing=again)  # type: ignore[arg-type]
            plan = plan_memory(config, way, micro_batch_tokens, largest)
            settings = {"full": full, "quantize": quantize, "activation_checkpointing": "block" if again else "none"}
            words = name + ", activation checkpointing" * again
            found.append(Way(words, settings, plan.peak, plan.peak - plan.process <= SHARE * free))
    return found


def table(found: list[Way], free: int) -> Table:
    """The ways with their expected peaks."""
    shown = Table("", "expected peak", "fits", title=f"ways to train: {gigabytes(free)} are free")
    for way in found:
        lacking = way.settings["quantize"] != "none" and not has_library()
        fits = "yes" + ", with ptst-lab[quant]" * lacking if way.fits else "no"
        shown.add_row(way.name, gigabytes(way.peak), fits)
    return shown
