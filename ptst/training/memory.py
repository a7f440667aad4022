"""The memory that a training run will take, planned before it is allocated.

The figures follow from the config and from what the operations keep for the backward pass (kernels/lora_layer.py,
kernels/attention.py, kernels/linear_cross_entropy.py); a test compares them with what autograd keeps. Per token and
layer, in elements, with E hidden, F intermediate, H and K heads of D, R the ranks of the layer's adapters together:

    LoRA           2 E + 2 H D + 2 K D + 2 F + R     x of both halves; q, k, v; attention's output; gate, up; z
    all weights    4 E + 2 H D + 2 K D + 3 F         the normed x of both halves and the product of gate and up as well
    by block       E                                 activation checkpointing: x alone, and one layer's at a time

There are a few float32 statistics besides. At the peak come one layer's temporaries (three of F, four of E) or the
loss's chunk of logits, whichever is larger.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ptst.errors import Setting, UserError, Words
from ptst.free_memory import free_memory
from ptst.kernels import linear_cross_entropy as loss
from ptst.model.config import DecoderConfig, LoraConfig

STEP = 256  # tokens; a chosen micro-batch is a multiple of this
MOST = {"cpu": 4096, "cuda": 32768}  # a larger micro-batch is no faster
SHARE = 0.9  # of the free memory is planned with
# Of activations and temporaries: what a CPU's allocator holds beyond the tensors, since freed blocks of one micro-batch
# do not fit the next. Measured on SmolLM2-135M: 10 to 40 % over micro-batches of 1,024 and 2,048 tokens.
FRAGMENTS = 0.3


def shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's projections."""
    c = config
    q, kv, e, f = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    return {
        "q_proj": (q, e), "k_proj": (kv, e), "v_proj": (kv, e), "o_proj": (e, q),
        "gate_proj": (f, e), "up_proj": (f, e), "down_proj": (e, f),
    }  # fmt: skip


def count_parameters(config: DecoderConfig) -> int:
    """All weights of the decoder; a tied head counts once."""
    c = config
    layer = sum(o * i for o, i in shapes(c).values()) + 2 * c.hidden_size
    return c.num_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)


def count_adapter(config: DecoderConfig, lora: LoraConfig) -> int:
    return config.num_layers * sum(lora.rank * sum(shapes(config)[t]) for t in lora.targets)


def activation_bytes(
    config: DecoderConfig,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    tokens: int,
    activation_checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps between forward and backward for a micro-batch of `tokens`; `lora` None: full
    fine-tuning."""
    c, size = config, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = 2 * c.hidden_size + 2 * heads + 2 * kv + 2 * c.intermediate_size
    layer += 2 * c.hidden_size + c.intermediate_size if lora is None else lora.rank * len(lora.targets)
    layer = layer * size + 2 * wide + c.num_heads * wide  # the norms' and the attention's statistics
    angles = 2 * (c.head_dim // 2) * 4
    # The final norm's x and statistic, the gradient of its output, which the loss forms early, and that output.
    last = 2 * c.hidden_size * size + wide
    if activation_checkpointing:
        return tokens * (c.num_layers * c.hidden_size * size + layer + angles + last)
    return tokens * (c.num_layers * layer + angles + last)


_BLOCK = (Setting("activation_checkpointing"), " to block")
PURPOSES = ("weights", "gradients", "optimizer", "activations", "temporaries", "fragments", "process")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and the counts they follow from. `process`, what is held before the run begins, and `fragments`
    are zero on a GPU, whose peak is that of allocated memory."""

    parameters: int
    trained: int
    micro_batch_tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    fragments: int
    process: int
    steps: int | None = None
    tokens: int | None = None

    @property
    def peak(self) -> int:
        return sum(getattr(self, name) for name in PURPOSES)

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes(getattr(self, name))}" for name in PURPOSES[:5])
        return f"{gigabytes(self.peak)} with micro-batches of {self.micro_batch_tokens} tokens: {parts}"

    def table(self) -> Table:
        table = Table("", "", title="memory and step plan", show_header=False)
        counts = {"parameters": self.parameters, "of them trained": self.trained, "optimizer steps": self.steps}
        counts |= {"tokens": self.tokens, "tokens in a micro-batch": self.micro_batch_tokens}
        for name, value in counts.items():
            if value is not None:
                table.add_row(name, f"{value:,}")
        for name in PURPOSES:
            table.add_row(name, gigabytes(getattr(self, name)))
        table.add_row("expected peak", gigabytes(self.peak))
        return table


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def plan_memory(
    config: DecoderConfig, lora: LoraConfig | None, dtype: torch.dtype, micro_batch_tokens: int, device: str,
    activation_checkpointing: bool = False,
) -> MemoryPlan:  # fmt: skip
    """The plan of a run. `lora` None: full fine-tuning; `device` "cpu" or "cuda"."""
    size = dtype.itemsize
    parameters = count_parameters(config)
    trained = parameters if lora is None else count_adapter(config, lora)
    # Adapters are float32 or wider whatever the base; AdamW's two moments have the dtype of what they belong to.
    each = size if lora is None else torch.promote_types(dtype, torch.float32).itemsize
    layer = (3 * config.intermediate_size + 4 * config.hidden_size) * size * micro_batch_tokens
    chunk = loss.CHUNK_BYTES if device == "cuda" else loss.CHUNK_ELEMENTS * size
    activations = activation_bytes(config, lora, dtype, micro_batch_tokens, activation_checkpointing)
    temporaries = max(layer, min(chunk, micro_batch_tokens * config.vocab_size * size))
    return MemoryPlan(
        parameters=parameters,
        trained=trained,
        micro_batch_tokens=micro_batch_tokens,
        weights=parameters * size + (0 if lora is None else trained * each),
        gradients=trained * each,
        optimizer=2 * trained * each,
        activations=activations,
        temporaries=temporaries,
        fragments=round(FRAGMENTS * (activations + temporaries)) if device == "cpu" else 0,
        process=_resident() if device == "cpu" else 0,
    )


def choose_micro_batch_tokens(
    config: DecoderConfig, lora: LoraConfig | None, dtype: torch.dtype, device: str, activation_checkpointing: bool,
    longest: int, free: int | None = None,
) -> int:  # fmt: skip
    """The largest micro-batch in tokens that fits the free memory, a multiple of 256 up to where larger ones are no
    faster; at least the longest example. Raises UserError where not even that fits."""
    free = free_memory(device) if free is None else free

    def fits(tokens: int) -> bool:
        plan = plan_memory(config, lora, dtype, tokens, device, activation_checkpointing)
        return plan.peak - plan.process <= SHARE * free

    if not fits(longest):
        plan = plan_memory(config, lora, dtype, longest, device, activation_checkpointing)
        shorter: Words = ("lower ", Setting("max_length"))
        remedy = shorter if activation_checkpointing else ("set ", *_BLOCK, ", or ", *shorter)
        raise UserError(f"{gigabytes(free)} are free, and the longest example alone needs {plan}", remedy)
    most = max(longest, MOST[device])
    return max(longest, max((t for t in range(STEP, most + 1, STEP) if fits(t)), default=longest))


def _resident() -> int:
    """Bytes this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def explain_oom(plan: MemoryPlan) -> Iterator[None]:
    """Turn torch's out-of-memory error into a UserError with the plan and the settings to change."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        remedy = ("lower ", Setting("micro_batch_tokens"), " (the result stays the same) or set ", *_BLOCK)
        raise UserError(f"out of memory: the plan was {plan}", remedy) from None
