"""The memory that a training run will take, planned before it is allocated.

The figures follow from the config and from what the operations keep for the backward pass (kernels/lora_layer.py,
kernels/attention.py, kernels/linear_cross_entropy.py); a test compares them with what autograd keeps. Per token and
layer, in elements, with E hidden, F intermediate, H and K heads of D, R the ranks of the layer's adapters together:

    LoRA           2 E + 2 H D + 2 K D + 2 F + R     x of both halves; q, k, v; attention's output; gate, up; z
    all weights    4 E + 2 H D + 2 K D + 3 F         the normed x of both halves and the product of gate and up as well
    q, k normed    H D + K D                         also as they were before
    norms after    2 E                               LoRA only: what the two norms read
    by block       E                                 activation checkpointing: x alone, and one layer's at a time

There are a few float32 statistics besides. At the peak come one layer's temporaries (three of F, four of E) or the
loss's chunk of logits, whichever is larger.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from rich.table import Table

from ptst.errors import Setting, UserError, Words
from ptst.kernels import linear_cross_entropy as loss
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.fold import fold_bytes
from ptst.model.quantized import quantized_bytes
from ptst.model.weights import pick_dtype
from ptst.settings import Quantize
from ptst.system_memory import free_memory, resident_memory
from ptst.training.config import TrainSettings
from ptst.training.schedule import WeightUpdate
from ptst.training.sharded_memory import spread

STEP = 256  # tokens; a chosen micro-batch is a multiple of this
MOST = {"cpu": 4096, "cuda": 32768}  # a larger micro-batch is no faster
SHARE = 0.9  # of the free memory is planned with
# What training and the sampler load into the process after the plan: code, compiled loops, buffers of libraries.
# Measured with torch 2.13 on models of 29 to 135 million parameters, 110 to 130 MB each.
LIBRARIES = 115_000_000
SAMPLER = 125_000_000
QUANTIZER = 130_000_000  # bitsandbytes 0.50
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
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = sum(o * i for o, i in shapes(c).values()) + 2 * c.hidden_size
    layer += heads + 2 * kv if c.qkv_bias else 0
    layer += {None: 0, "head": 2 * c.head_dim, "projection": heads + kv}[c.qk_norm]
    return c.num_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)


def count_adapter(config: DecoderConfig, lora: LoraConfig) -> int:
    return config.num_layers * sum(lora.rank * sum(shapes(config)[t]) for t in lora.targets)


def frozen_bytes(config: DecoderConfig, dtype: torch.dtype, quantize: Quantize) -> int:
    """Bytes of the base's weights, whose projections may be quantized."""
    projections = shapes(config).values()
    total = count_parameters(config) * dtype.itemsize
    if quantize == "none":
        return total
    saved = sum(o * i * dtype.itemsize - quantized_bytes(quantize, (o, i)) for o, i in projections)
    return total - config.num_layers * saved


def adapter_bytes(config: DecoderConfig, method: "Method") -> int:
    """Bytes of the adapters, and on a GPU of those folded beside a base that is whole and unquantized
    (ptst/model/fold.py)."""
    if method.lora is None:
        return 0
    folds = method.device == "cuda" and method.quantize == "none" and method.ranks == 1
    folded = fold_bytes(config, method.lora, shapes(config), method.dtype.itemsize) if folds else 0
    return count_adapter(config, method.lora) * method.wide + folded


def dequantized_bytes(config: DecoderConfig, method: "Method") -> int:
    """Bytes of the one weight that is dequantized at a time: its values, in int8 also in float32, and the sum with its
    adapter that a product on a CPU may read (kernels/lora.py)."""
    if method.quantize == "none":
        return 0
    size = method.dtype.itemsize * (2 if method.device == "cpu" and method.dtype.itemsize == method.wide else 1)
    return max(o * i for o, i in shapes(config).values()) * (size + 4 * (method.quantize == "int8"))


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
    layer += 2 * c.hidden_size if c.post_norm and lora is not None else 0
    layer += heads + kv if c.qk_norm else 0
    qk_statistics = {None: 0, "head": c.num_heads + c.num_kv_heads, "projection": 2}[c.qk_norm]
    layer = layer * size + (2 + qk_statistics + c.num_heads) * wide  # the norms' and the attention's statistics
    angles = 2 * (c.head_dim // 2) * 4 * len(c.ropes)
    # The final norm's x and statistic, the gradient of its output, which the loss forms early, and that output.
    last = 2 * c.hidden_size * size + wide
    if activation_checkpointing:
        return tokens * (c.num_layers * c.hidden_size * size + layer + angles + last)
    return tokens * (c.num_layers * layer + angles + last)


@dataclass(frozen=True)
class Method:
    """How a model is trained, as far as memory goes. `lora` None: full fine-tuning; `device` "cpu" or "cuda";
    `samples`: sample answers are generated on the way. `average`, `anchor`: a running average of what is trained, and a
    copy of it that a proximal term pulls to, are kept. `ranks`: over how many the weights are spread."""

    lora: LoraConfig | None
    dtype: torch.dtype
    device: str = "cpu"
    activation_checkpointing: bool = False
    weight_update: WeightUpdate = "master"
    samples: bool = False
    average: bool = False
    anchor: bool = False
    quantize: Quantize = "none"
    ranks: int = 1

    @classmethod
    def of(cls, settings: TrainSettings) -> Self:
        """That of a run with these settings on this machine."""
        return cls(
            settings.lora,
            pick_dtype(settings.dtype),
            "cuda" if torch.cuda.is_available() else "cpu",
            settings.activation_checkpointing == "block",
            settings.weight_update,
            samples=bool(settings.eval_every),
            average=bool(settings.average),
            anchor=bool(settings.proximal),
            quantize=settings.quantize,
        )

    @property
    def wide(self) -> int:
        """Bytes of an element of gradients, moments, masters and adapters: float32 or wider."""
        return torch.promote_types(self.dtype, torch.float32).itemsize


_BLOCK = (Setting("activation_checkpointing"), " to block")
PURPOSES = (
    "weights",
    "masters",
    "gradients",
    "optimizer",
    "copies",
    "activations",
    "temporaries",
    "fragments",
    "libraries",
    "process",
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and the counts they follow from: tokens that a micro-batch may have, and that the largest one
    computes. `copies`: an average of the weights and an anchor, where the run has them. `process`, what is held before
    the run begins, `libraries` and `fragments` are zero on a GPU, whose peak is that of allocated memory."""

    parameters: int
    trained: int
    micro_batch_tokens: int
    largest_micro_batch: int
    weights: int
    masters: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    temporaries: int
    fragments: int
    libraries: int
    process: int
    steps: int | None = None
    tokens: int | None = None

    @property
    def peak(self) -> int:
        return sum(getattr(self, name) for name in PURPOSES)

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}

    def __str__(self) -> str:
        names = [name for name in PURPOSES[:7] if name != "copies" or self.copies]
        parts = ", ".join(f"{name} {gigabytes(getattr(self, name))}" for name in names)
        return f"{gigabytes(self.peak)} with micro-batches of {self.micro_batch_tokens} tokens: {parts}"

    def table(self) -> Table:
        table = Table("", "", title="memory and step plan", show_header=False)
        counts = {"parameters": self.parameters, "of them trained": self.trained, "optimizer steps": self.steps}
        counts |= {"tokens": self.tokens, "tokens in a micro-batch, at most": self.micro_batch_tokens}
        counts |= {"in the largest micro-batch": self.largest_micro_batch}
        for name, value in counts.items():
            if value is not None:
                table.add_row(name, f"{value:,}")
        for name in PURPOSES:
            if name != "copies" or self.copies:
                table.add_row(name, gigabytes(getattr(self, name)))
        table.add_row("expected peak", gigabytes(self.peak))
        return table


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _libraries(method: Method) -> int:
    """Bytes of what a CPU's process loads besides. Over spread weights, samples are not the engine's."""
    engine = method.samples and method.ranks == 1
    return LIBRARIES + SAMPLER * engine + QUANTIZER * (method.quantize != "none")


def plan_memory(
    config: DecoderConfig, method: Method, micro_batch_tokens: int, largest: int | None = None
) -> MemoryPlan:
    """The plan of a run. `largest`: tokens that its largest micro-batch computes, if fewer than the limit."""
    tokens = largest or micro_batch_tokens
    size, lora, dtype, cpu = method.dtype.itemsize, method.lora, method.dtype, method.device == "cpu"
    parameters, head = count_parameters(config), config.vocab_size * config.hidden_size
    trained = parameters if lora is None else count_adapter(config, lora)
    layer = (3 * config.intermediate_size + 4 * config.hidden_size) * size * tokens + dequantized_bytes(config, method)
    chunk = loss.CHUNK_ELEMENTS * size if cpu else loss.CHUNK_BYTES
    chunk = min(chunk, tokens * config.vocab_size * size)
    narrow = size < method.wide
    if lora is None:  # the head's gradient, as the loss sums it, multiplied, and in the weights' dtype
        chunk = max(chunk + head * method.wide, head * (2 * method.wide + size * narrow))
    stochastic = lora is None and method.weight_update == "stochastic"
    kept = size if stochastic else method.wide  # bytes of an element in a checkpoint
    activations = activation_bytes(config, lora, dtype, tokens, method.activation_checkpointing)
    temporaries = max(layer, chunk)
    whole = MemoryPlan(
        parameters=parameters,
        trained=trained,
        micro_batch_tokens=micro_batch_tokens,
        largest_micro_batch=tokens,
        weights=frozen_bytes(config, dtype, method.quantize) + adapter_bytes(config, method),
        masters=trained * method.wide if lora is None and narrow and method.weight_update == "master" else 0,
        gradients=trained * method.wide,
        optimizer=2 * trained * method.wide,
        copies=trained * (method.wide * method.average + kept * method.anchor),
        activations=activations,
        temporaries=temporaries,
        fragments=round(FRAGMENTS * (activations + temporaries)) if cpu else 0,
        libraries=_libraries(method) if cpu else 0,
        process=resident_memory() if cpu else 0,
    )
    if method.ranks == 1:
        return whole
    root = head * (1 if config.tie_embeddings else 2) + config.hidden_size
    block = (parameters - root) // config.num_layers
    return replace(whole, **spread(whole, block, root, size, method.wide, method.ranks, cpu))


def fits(config: DecoderConfig, method: Method, tokens: int, free: int) -> bool:
    """Whether a run with micro-batches of so many tokens fits into what is free."""
    plan = plan_memory(config, method, tokens)
    return plan.peak - plan.process <= SHARE * free


def choose_micro_batch_tokens(config: DecoderConfig, method: Method, longest: int, free: int | None = None) -> int:
    """The largest micro-batch in tokens that fits the free memory, a multiple of 256 up to where larger ones are no
    faster; at least the longest example. Raises UserError where not even that fits."""
    free = free_memory(method.device) if free is None else free

    if not fits(config, method, longest, free):
        needed = plan_memory(config, method, longest)
        cause = f"{gigabytes(free)} are free, and the longest example alone needs {needed}"
        raise UserError(cause, _smaller(method, lambda way: plan_memory(config, way, longest), free))
    most = max(longest, MOST[method.device])
    return max(longest, max((t for t in range(STEP, most + 1, STEP) if fits(config, method, t, free)), default=longest))


def _smaller(method: Method, plan: Callable[[Method], MemoryPlan], free: int) -> Words:
    """What to change where a method does not fit: the first of the ways that does, if one does."""
    shorter: Words = ("lower ", Setting("max_length"))
    block: Words = () if method.activation_checkpointing else ("set ", *_BLOCK)
    narrower = method.lora is not None and method.quantize == "none" and method.ranks == 1
    kinds: tuple[Quantize, ...] = ("int8", "nf4") if narrower else ()
    for quantize in (method.quantize, *kinds):
        for again in sorted({method.activation_checkpointing, True}):
            way = replace(method, quantize=quantize, activation_checkpointing=again)
            planned = plan(way)
            if planned.peak - planned.process <= SHARE * free:
                narrow: Words = ("set ", Setting("quantize"), f" to {quantize}") if quantize != method.quantize else ()
                more = block if again else ()
                both: Words = (*narrow, " and ", *more) if narrow and more else (*narrow, *more)
                return (*both, ", or ", *shorter)
    return (*block, ", or ", *shorter) if block else shorter


@contextmanager
def explain_oom(plan: MemoryPlan) -> Iterator[None]:
    """Turn torch's out-of-memory error into a UserError with the plan and the settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in ("can't allocate memory", "unable to mmap")):
            raise
        remedy = ("lower ", Setting("micro_batch_tokens"), " (the result stays the same) or set ", *_BLOCK)
        raise UserError(f"out of memory: the plan was {plan}", remedy) from None
