"""A frozen base in 4 or 8 bits for LoRA, by bitsandbytes (the extra `quant`); what is trained stays float32.

Quantized are the projections of the layers; embedding, head, norms and biases keep the run's dtype:

    nf4    blocks of 64 values, each the nearest of 16 quantiles of a normal distribution times the block's largest
           absolute value; those maxima in 8 bits in turn ("double quantization"): QLoRA, arXiv 2305.14314, section 3
    int8   127 steps to the largest absolute value of a row: LLM.int8(), arXiv 2208.07339, without its outliers

Codes follow from the values in the file as float32, so that they are the same for every dtype of a run.

A `QuantizedWeight` takes a weight's place: for every operation it is dequantized, and what came of that is freed with
the operation. So the layers, the fused functions of kernels/ and their backward passes need not know of it, and
nothing dequantized is kept between forward and backward.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ptst.errors import Setting, UserError
from ptst.model.config import TARGETS

Kind = Literal["nf4", "int8"]
BLOCK, MAXIMA = 64, 256  # values with a common factor (nf4); maxima with a common factor
PART = 2**22  # values that are quantized at a time, a multiple of BLOCK
_TABLES = 4 * (16 + 256 + 1)  # of a weight in nf4: its 16 values, those of the maxima and their mean


def has_library() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def check_library() -> None:
    """Raise UserError where bitsandbytes is not installed."""
    if not has_library():
        raise UserError(
            (Setting("quantize"), " needs bitsandbytes, which is not installed"), "pip install 'ptst-lab[quant]'"
        )


@cache
def _library() -> Any:
    """bitsandbytes.functional. Raises UserError where it is not installed."""
    check_library()
    with _no_code_from_the_hub():
        import bitsandbytes.functional

    return bitsandbytes.functional


@contextmanager
def _no_code_from_the_hub() -> Iterator[None]:
    """On a CPU with bfloat16 arithmetic, bitsandbytes 0.50 fetches and runs a product from the hub when it is imported,
    by a package named `kernels`, and warns where there is none. We use none of its products."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    logger, missing = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()
    level, own = logger.level, sys.modules.get("kernels", missing)
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if own is not missing:
            sys.modules["kernels"] = own  # type: ignore[assignment]


@dataclass(frozen=True)
class _NF4:
    """`codes`: two values in a byte; `state`: bitsandbytes' record of the blocks' maxima.

    bitsandbytes gets a block a row, the last one filled up with zeros: its product for a CPU (0.50) takes no block to
    reach from one row into the next, and returns other values where one does."""

    codes: Tensor
    state: Any
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, weight_OI: Tensor, dtype: torch.dtype) -> "_NF4":
        library, flat, short = _library(), weight_OI.flatten(), -weight_OI.numel() % BLOCK
        if short:
            flat = torch.nn.functional.pad(flat, (0, short))
        # In parts: on a CPU, the library takes five times what it quantizes.
        parts = [
            library.quantize_4bit(part.view(-1, BLOCK), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
            for part in flat.split(PART)
        ]
        codes, absmax = torch.cat([c for c, _ in parts]), torch.cat([s.absmax for _, s in parts])
        mean = absmax.mean()
        coded, second = library.quantize_blockwise(absmax - mean, blocksize=MAXIMA)
        shape, code = torch.Size([len(absmax), BLOCK]), parts[0][1].code
        state = library.QuantState(coded, shape, code, BLOCK, "nf4", dtype, offset=mean, state2=second)
        return cls(codes, state, weight_OI.shape, dtype)

    def dense(self) -> Tensor:
        values = _library().dequantize_4bit(self.codes, self.state)
        return values.view(-1)[: self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class _Int8:
    """`codes` (O, I) from -127 to 127, `absmax` (O,) the largest absolute value of each row."""

    codes: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, weight_OI: Tensor, dtype: torch.dtype) -> "_Int8":
        quantize, rows = _library().int8_vectorwise_quant, max(1, PART // weight_OI.shape[1])
        parts = [quantize(part_OI.to(torch.float16)) for part_OI in weight_OI.split(rows)]
        codes, absmax = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return cls(codes, absmax, weight_OI.shape, dtype)

    def dense(self) -> Tensor:
        return _library().int8_vectorwise_dequant(self.codes, self.absmax).to(self.dtype)


class QuantizedWeight(Tensor):
    """A frozen weight (O, I) that is kept quantized. Shape, dtype and device are those of its values; every operation
    gets the values, computed for it anew. Raises TypeError for one that would write to it."""

    stored: _NF4 | _Int8

    @staticmethod
    def __new__(cls, stored: _NF4 | _Int8) -> "QuantizedWeight":
        how: dict[str, Any] = {"dtype": stored.dtype, "device": stored.codes.device}
        weight = Tensor._make_wrapper_subclass(cls, stored.shape, **how)
        weight.stored = stored
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """The values, (O, I) in `dtype`."""
        return self.stored.dense()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].stored)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise TypeError(f"{func} would write to a quantized weight, which is frozen")
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Quantization:
    """What becomes of the projections' weights. `packed`: they stay quantized, and are dequantized for every use;
    otherwise their values alone are rounded so, which computes the same, faster, in the memory of the run's dtype."""

    kind: Kind
    packed: bool = False

    @classmethod
    def of(cls, setting: str, packed: bool = False) -> "Quantization | None":
        """That of a setting; None for `none`."""
        return None if setting == "none" else cls(setting, packed)  # type: ignore[arg-type]

    def applies(self, key: str) -> bool:
        """Whether a parameter of the decoder (`layers.0.mlp.up_proj.weight`) is quantized."""
        return key.removesuffix(".weight").rpartition(".")[2] in TARGETS and key.endswith(".weight")

    def __call__(self, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight with quantized values in `dtype`, from its values in float32."""
        stored = (_NF4 if self.kind == "nf4" else _Int8).of(weight_OI.float().contiguous(), dtype)
        return QuantizedWeight(stored) if self.packed else stored.dense()


def described_dtype(dtype: torch.dtype, quantize: str) -> str:
    """What weights are computed in, for records and fingerprints: `float32`, or `float32, base in nf4`."""
    name = str(dtype).removeprefix("torch.")
    return name if quantize == "none" else f"{name}, base in {quantize}"


def quantized_bytes(kind: Kind, shape: tuple[int, int]) -> int:
    """Bytes that a weight of this shape (O, I) takes."""
    count = shape[0] * shape[1]
    if kind == "int8":
        return count + 4 * shape[0]
    blocks = -(-count // BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * -(-blocks // MAXIMA) + _TABLES
