"""The decoder's forward pass for sampling: the same function as `Decoder.forward`, with nothing that costs a step time.

Projections that read the same input are one product (query | key | value, gate | up). The decoder's own weights become
views of the joined matrix, so that this takes no second copy. Adapters add their thin products row by row.

On a CPU a bfloat16 (or float16) model is computed in float32, with a packed copy of its weights that is 16 bits wide
and widened inside the product: there is no bfloat16 arithmetic in most CPUs, and reading the weights is what decoding
a few answers costs. What lies between the products goes through Numba's loops (kernels/cpu.py).

Shapes: T tokens, N rows, E hidden_size, F intermediate_size, H query heads, K key/value heads, D head_dim, V
vocabulary; I and O a projection's input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ptst.generation.adapters import GROUPS, Adapter, ThinPair, attached_adapter, thin_pairs
from ptst.generation.attend import StepAttention
from ptst.generation.cache import cache_dtype
from ptst.kernels import cpu_layer
from ptst.kernels.cpu import use_numba
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import frequencies, tables
from ptst.kernels.swiglu import swiglu_forward
from ptst.model.decoder import Decoder

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

# Rows of one adapter: (its name, None for the decoder's own; the rows, None for all).
AdapterRows = Sequence[tuple[str | None, Tensor | None]]
ALL_OWN: AdapterRows = ((None, None),)
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    products: list[Product]  # one for each of GROUPS
    attention_norm: Tensor
    mlp_norm: Tensor


# What packing has made of a decoder, with the weights it was made of: the next engine over it has nothing to wait for.
_PACKED: WeakKeyDictionary[Decoder, tuple[tuple, list[_Layer], Product]] = WeakKeyDictionary()


def _prepared(decoder: Decoder, dtype: torch.dtype) -> tuple[list[_Layer], Product]:
    """The layers and the head."""
    joined = []
    for layer in decoder.layers:
        parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
        joined.append([join([parts[leaf].weight for leaf in group]) for group in GROUPS])
    weights = [p for name, p in decoder.named_parameters() if ".lora_" not in name]
    made_of = None
    if decoder.dtype != dtype and not any(w.requires_grad or w.is_inference() for w in weights):
        # Written to or replaced, a weight has another version or place.
        made_of = (dtype, *((w.data_ptr(), w._version) for w in weights))
    packed = _PACKED.pop(decoder, None)  # out of the way, where it is not of these weights
    if packed is not None and packed[0] == made_of:
        _PACKED[decoder] = packed
        return packed[1:]
    del packed
    layers = []
    for layer, group in zip(decoder.layers, joined, strict=True):
        norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        layers.append(_Layer([_product(w, dtype) for w in group], *(w.detach().to(dtype) for w in norms)))
    head = _product(decoder.head_VE.detach(), dtype)
    if made_of is not None:
        _PACKED[decoder] = made_of, layers, head
    return layers, head


def _product(w_OI: Tensor, dtype: torch.dtype) -> Product:
    return half_width_product(w_OI) if w_OI.dtype != dtype else lambda x_TI: linear(x_TI, w_OI)


class Forward:
    """A decoder made ready for sampling; `adapters` are those that requests may name."""

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter] | None = None):
        c = self.config = decoder.config
        self.device = decoder.device
        on_cpu = self.device.type == "cpu"
        # float64 stays what it is, for tests.
        self.dtype = torch.promote_types(decoder.dtype, torch.float32) if on_cpu else decoder.dtype
        self.embedding_VE = decoder.embed_tokens.weight.detach()
        self.norm = decoder.norm.weight.detach().to(self.dtype)
        self.numba = use_numba(torch.empty(0, dtype=self.dtype, device=self.device))
        self.cache_dtype = cache_dtype(decoder.dtype, self.device)
        self.frequencies = frequencies(c.head_dim, c.rope_theta, c.rope_scaling).to(self.device)
        # Outside inference mode, or the decoder's weights could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            self.layers, self.head = _prepared(decoder, self.dtype)
            own = attached_adapter(decoder)
            # After attention and after the feed-forward part of each layer.
            after = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]
            norms = [(layer.mlp_norm, norm) for layer, norm in zip(self.layers, after, strict=True)]
            self.norms = [(a.numpy(), b.numpy()) for a, b in norms] if self.numba else norms
            named = {**({None: own} if own else {}), **(adapters or {})}
            self.thin: dict[str | None, list[list[ThinPair | None]]] = {
                name: thin_pairs(adapter, decoder, self.dtype) for name, adapter in named.items()
            }

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, attend: StepAttention, adapters: AdapterRows = ALL_OWN
    ) -> Tensor:
        """Hidden states (T, E) after the final norm. `attend` also keeps the new keys and values."""
        c, eps = self.config, self.config.rms_norm_eps
        cos_T1D2, sin_T1D2 = tables(positions_T, self.frequencies)
        thin = [(self.thin[name], rows) for name, rows in adapters if name in self.thin]
        total_TE = self.embedding_VE[tokens_T].to(self.dtype)
        x_TE = rms_norm(total_TE, self.layers[0].attention_norm, eps)

        def project(index: int, group: int, x_TI: Tensor) -> Tensor:
            y_TO = self.layers[index].products[group](x_TI)
            for pairs, rows in thin:
                pair = pairs[index][group]
                if pair is not None:
                    pair.add(y_TO, x_TI, rows)
            return y_TO

        if self.numba:
            return self._by_numba(x_TE, total_TE, cos_T1D2, sin_T1D2, attend, project)
        for index, (mlp_norm, norm_after) in enumerate(self.norms):
            qkv_THD = project(index, 0, x_TE).view(len(x_TE), -1, c.head_dim)
            attended_TE = project(index, 1, attend(index, qkv_THD, cos_T1D2, sin_T1D2).flatten(1))
            x_TE, total_TE = add_rms_norm(attended_TE, total_TE, mlp_norm, eps)
            h_TF = swiglu_forward(*project(index, 2, x_TE).chunk(2, dim=1))
            x_TE, total_TE = add_rms_norm(project(index, 3, h_TF), total_TE, norm_after, eps)
        return x_TE

    def _by_numba(
        self,
        x_TE: Tensor,
        total_TE: Tensor,
        cos_T1D2: Tensor,
        sin_T1D2: Tensor,
        attend: StepAttention,
        project: Callable[[int, int, Tensor], Tensor],
    ) -> Tensor:
        """The layers with loops compiled for the CPU. What lies between two products is written in place: for one row,
        making a tensor takes as long as the arithmetic."""
        c, T = self.config, len(x_TE)
        eps, turn = np.float32(c.rms_norm_eps), (cos_T1D2[:, 0].numpy(), sin_T1D2[:, 0].numpy())
        out_THD, h_TF = x_TE.new_empty(T, c.num_heads, c.head_dim), x_TE.new_empty(T, c.intermediate_size)
        out_TO, h, total = out_THD.view(T, -1), h_TF.numpy(), total_TE.numpy()
        for index, (mlp_norm, norm_after) in enumerate(self.norms):
            attend.into(out_THD, index, project(index, 0, x_TE).view(T, -1, c.head_dim), *turn)
            x_TE = project(index, 1, out_TO)
            cpu_layer.add_rms_norm(x_TE.numpy(), total, mlp_norm, eps)
            cpu_layer.swiglu(project(index, 2, x_TE).numpy(), h)
            x_TE = project(index, 3, h_TF)
            cpu_layer.add_rms_norm(x_TE.numpy(), total, norm_after, eps)
        return x_TE

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """(N, V)."""
        return self.head(hidden_NE)


def join(weights: Sequence[Tensor]) -> Tensor:
    """One (sum of O, I) matrix of several layers' weights, which become views of it."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    rows = [len(w) for w in weights]
    ends = [w.data_ptr() + w.numel() * w.element_size() for w in weights]
    if ends[:-1] == [w.data_ptr() for w in weights[1:]] and len({w.untyped_storage().data_ptr() for w in weights}) == 1:
        return first.as_strided((sum(rows), first.shape[1]), (first.shape[1], 1))  # joined before
    whole_OI = torch.cat([w.detach() for w in weights])
    for w, part in zip(weights, whole_OI.split(rows), strict=True):
        w.data = part
    return whole_OI


def linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x W^T. On a CPU, for two to six rows, as (W x^T)^T, which the library does half as fast again."""
    if x_TI.is_cuda or not 2 <= x_TI.shape[0] <= 6:
        return torch.nn.functional.linear(x_TI, w_OI)
    return (w_OI @ x_TI.t()).t().contiguous()


def half_width_product(w_OI: Tensor) -> Product:
    """x (T, I) in float32 -> x W^T in float32, over a 16-bit weight, on a CPU.

    FBGEMM's product over packed float16 weights; they are widened in registers. bfloat16 weights go into float16
    exactly but for those below 2^-17 (an error of 2^-25 at most); where one is too large for float16, and where torch
    has no FBGEMM, the weight is widened once and for all.
    """
    packed = None
    if FBGEMM and float(w_OI.abs().max()) < 65504:
        packed = torch.ops.quantized.linear_prepack_fp16(w_OI.float(), None)
    if packed is None:
        wide_OI = w_OI.float()
        return lambda x_TI: torch.nn.functional.linear(x_TI, wide_OI)
    # Without the wrapper, which looks for arguments that it must treat in Python and takes ten microseconds.
    product = torch.ops.quantized.linear_dynamic_fp16.default
    product = getattr(product, "_op", product)
    return lambda x_TI: product(x_TI, packed)
