"""Paged attention of one step (paged_attention.py) that also normalizes queries and keys, where one kernel does that,
rotates and stores: by head, as Qwen3 does. Norms over all heads together (OLMo 2 and 3) are the forward pass's own."""

from collections.abc import Sequence

from torch import Tensor

from ptst.generation.kv_cache import BlockTable, KVCache
from ptst.generation.paged_attention import StepAttention
from ptst.kernels.rope_store import HeadNorms, rotate_and_store
from ptst.model.config import DecoderConfig


class NormedAttention(StepAttention):
    """`head_norms`: of each layer; none where heads have no norms of their own."""

    head_norms: Sequence[HeadNorms]

    def __init__(
        self,
        cache: KVCache,
        decode: Sequence[tuple[BlockTable, int]],
        prefill: Sequence[tuple[BlockTable, int, int]],
        config: DecoderConfig,
        head_norms: Sequence[HeadNorms],
    ):
        super().__init__(cache, decode, prefill, config)
        self.head_norms = head_norms

    @property
    def normalizes(self) -> bool:
        """Whether queries and keys come without their norms."""
        return bool(self.head_norms) and self.slots_T is not None

    def _rotate_and_store(self, layer: int, qkv_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> Tensor:
        if not self.head_norms or self.slots_T is None:
            return super()._rotate_and_store(layer, qkv_THD, cos_T1D2, sin_T1D2)
        stored = self.slots_T, *self.cache.layers[layer]
        return rotate_and_store(qkv_THD, cos_T1D2, sin_T1D2, *stored, self.head_norms[layer])
