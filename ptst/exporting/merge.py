"""The weights to write: those of the base model's files, an adapter merged into them in float32 and rounded once.

Every tensor is computed when it is asked for, so that no more of the model is in memory than is being written.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptst.errors import Setting, UserError
from ptst.exporting.adapter import Adapter
from ptst.model.lora import merged_weight
from ptst.model.quantized import Quantization
from ptst.model.read_in_place import StoredTensor
from ptst.model.weights import hf_name, read_weights

PRECISE = (torch.float32, torch.float64)


def in_order_of_the_hub(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Parameters in the order of transformers' modules, which decides about their files: embedding, layers (attention,
    feed-forward, norms), norm, head."""

    def place(key: str) -> tuple[int, int, int]:
        top, _, rest = key.partition(".")
        if top != "layers":
            return ("embed_tokens", "layers", "norm", "lm_head").index(top), 0, 0
        index, _, part = rest.partition(".")
        return 1, int(index), {"self_attn": 0, "mlp": 1}.get(part.partition(".")[0], 2)

    return {key: stored[key] for key in sorted(stored, key=place)}


@dataclass(frozen=True)
class MergedWeights:
    """`stored`: where the values are, by parameter, in the order in which they are written. `dtype`: of all tensors
    written; None: each has that of its file. `quantization`: how the base was rounded when the adapter was trained, and
    is here."""

    stored: Mapping[str, StoredTensor]
    adapter: Adapter | None = None
    dtype: torch.dtype | None = None
    quantization: Quantization | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, by its name in the files."""
        return {hf_name(key): each.numel * self.dtype_of(key).itemsize for key, each in self.stored.items()}

    @property
    def num_parameters(self) -> int:
        return sum(each.numel for each in self.stored.values())

    @property
    def rounded(self) -> dict[str, torch.dtype]:
        """The weights whose values are rounded on the way, with the type that they are rounded to."""
        merged = self.adapter.matrices if self.adapter else {}
        return {
            key: self.dtype_of(key)
            for key, each in self.stored.items()
            if self._changed(key, merged) or self.dtype_of(key) not in (each.dtype, *PRECISE)
        }

    def _changed(self, key: str, merged: Collection[str]) -> bool:
        return key.removesuffix(".weight") in merged or self._quantization(key) is not None

    def _quantization(self, key: str) -> Quantization | None:
        return self.quantization if self.quantization is not None and self.quantization.applies(key) else None

    def dtype_of(self, key: str) -> torch.dtype:
        return self.dtype or self.stored[key].dtype

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these names in the files, in any order. Raises UserError for values that the type that they
        are written in cannot hold."""
        wanted = {key: each for key, each in self.stored.items() if hf_name(key) in names}
        for key, tensor in read_weights(wanted):
            yield hf_name(key), self._converted(key, tensor)

    def _converted(self, key: str, tensor: Tensor) -> Tensor:
        own = self.adapter.matrices.get(key.removesuffix(".weight")) if self.adapter else None
        dtype = self.dtype_of(key)
        if (quantize := self._quantization(key)) is not None:
            tensor = quantize(tensor, torch.float32)
        if own is None and tensor.dtype == dtype:
            return tensor.clone()  # a view would keep all pages of the file that were read in memory
        exact = tensor if own is None or self.adapter is None else merged_weight(tensor, *own, self.adapter.scale)
        written = exact.to(dtype)
        if not torch.isfinite(written).all():
            held = bool(torch.isfinite(exact).all())
            what = f"has values that {str(dtype).removeprefix('torch.')} cannot hold" if held else "is not finite"
            remedy = ("give ", Setting("dtype"), " bfloat16 or float32") if held else "look at the run's loss"
            raise UserError(f"{hf_name(key)} {what}", remedy, self.stored[key].path)
        return written
