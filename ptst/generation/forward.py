"""The decoder's forward pass for generation: the same function as `Decoder.forward`, made fast for few tokens.

Projections that read the same input are one product (query | key | value, gate | up). The decoder's own weights become
views of the joined matrix, so that this takes no second copy. Adapters add their shrink and expand row by row.

On a CPU a bfloat16 (or float16) model is computed in float32, over a packed copy of its weights in 16 bits that is
widened inside the product: most CPUs have no bfloat16 arithmetic, and reading the weights is what decoding a few
tokens costs. What lies between the products runs in Numba's loops (kernels/cpu_layer.py).

Shapes: T tokens, N rows, E hidden_size, F intermediate_size, H query heads, K key/value heads, D head_dim, V
vocabulary; I inputs and O outputs of a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ptst.generation.kv_cache import cache_dtype
from ptst.generation.multi_lora import GROUPS, Adapter, GroupLora, attached_adapter, group_adapter
from ptst.generation.paged_attention import StepAttention
from ptst.kernels import cpu_layer
from ptst.kernels.cpu import use_numba
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import frequencies, tables
from ptst.kernels.swiglu import swiglu
from ptst.model.decoder import Decoder, Layer

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

# (name of an adapter, None for the one attached to the decoder; its rows, None for all).
AdapterRows = Sequence[tuple[str | None, Tensor | None]]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    products: list[Product]  # one for each of GROUPS
    attention_norm_E: Tensor
    mlp_norm_E: Tensor


@dataclass(frozen=True)
class _Prepared:
    """A decoder's products in the dtype of computation, and the weights that they were made from."""

    made_of: tuple | None
    layers: list[_Layer]
    head: Product


# Packing takes seconds: the next engine over the same weights uses what is here.
_PACKED: WeakKeyDictionary[Decoder, _Prepared] = WeakKeyDictionary()


def _prepare(decoder: Decoder, dtype: torch.dtype) -> _Prepared:
    layers = cast(list[Layer], list(decoder.layers))
    joined = []
    for layer in layers:
        projections = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
        joined.append([join([cast(Tensor, projections[leaf].weight) for leaf in group]) for group in GROUPS])
    weights = [p for name, p in decoder.named_parameters() if ".lora_" not in name]
    made_of = None
    if decoder.dtype != dtype and not any(w.requires_grad or w.is_inference() for w in weights):
        # A weight that was written to or replaced has another version or address.
        made_of = (dtype, *((w.data_ptr(), w._version) for w in weights))
    packed = _PACKED.pop(decoder, None)  # frees products of other weights before the new ones are made
    if packed is None or packed.made_of != made_of:
        packed = None
        out = []
        for layer, group_weights in zip(layers, joined, strict=True):
            norms = [n.weight.detach().to(dtype) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
            out.append(_Layer([_product(w, dtype) for w in group_weights], *norms))
        packed = _Prepared(made_of, out, _product(decoder.head_VE.detach(), dtype))
    if made_of is not None:
        _PACKED[decoder] = packed
    return packed


def _product(w_OI: Tensor, dtype: torch.dtype) -> Product:
    return half_width_product(w_OI) if w_OI.dtype != dtype else lambda x_TI: linear(x_TI, w_OI)


class Forward:
    """A decoder prepared for generation; `adapters` are those that requests may name."""

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter] | None = None):
        c = self.config = decoder.config
        self.device = decoder.device
        on_cpu = self.device.type == "cpu"
        # float64 is kept, for tests.
        self.dtype = torch.promote_types(decoder.dtype, torch.float32) if on_cpu else decoder.dtype
        self.embedding_VE = decoder.embed_tokens.weight.detach()
        self.norm_E = decoder.norm.weight.detach().to(self.dtype)
        self.numba = use_numba(torch.empty(0, dtype=self.dtype, device=self.device))
        self.cache_dtype = cache_dtype(decoder.dtype, self.device)
        self.frequencies = frequencies(c.head_dim, c.rope_theta, c.rope_scaling).to(self.device)
        # Outside inference mode: the decoder's weights, which are replaced by views, must stay trainable.
        with torch.inference_mode(False), torch.no_grad():
            prepared = _prepare(decoder, self.dtype)
            self.layers, self.logits = prepared.layers, prepared.head  # logits: hidden states (N, E) -> (N, V)
            # The norms after attention and after the feed-forward block of each layer; as arrays for Numba.
            after = [*(layer.attention_norm_E for layer in self.layers[1:]), self.norm_E]
            pairs = [(layer.mlp_norm_E, norm) for layer, norm in zip(self.layers, after, strict=True)]
            self.norms: list[tuple[Any, Any]] = [(a.numpy(), b.numpy()) for a, b in pairs] if self.numba else pairs
            self.adapters: dict[str | None, list[list[GroupLora | None]]] = {}
            if (attached := attached_adapter(decoder)) is not None:
                self.adapters[None] = group_adapter(attached, decoder, self.dtype)
            for name, adapter in (adapters or {}).items():
                self.adapters[name] = group_adapter(adapter, decoder, self.dtype)

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, attend: StepAttention, adapter_rows: AdapterRows = ((None, None),)
    ) -> Tensor:
        """Hidden states (T, E) after the final norm. `attend` also stores the new keys and values."""
        c, eps = self.config, self.config.rms_norm_eps
        cos_T1D2, sin_T1D2 = tables(positions_T, self.frequencies)
        adapters = [(self.adapters[name], rows) for name, rows in adapter_rows if name in self.adapters]
        total_TE = self.embedding_VE[tokens_T].to(self.dtype)  # the residual stream
        x_TE = rms_norm(total_TE, self.layers[0].attention_norm_E, eps)

        def project(index: int, group: int, x_TI: Tensor) -> Tensor:
            y_TO = self.layers[index].products[group](x_TI)
            for layers, rows in adapters:
                lora = layers[index][group]
                if lora is not None:
                    lora.add_to(y_TO, x_TI, rows)
            return y_TO

        if self.numba:
            return self._with_numba((x_TE, total_TE), (cos_T1D2, sin_T1D2), attend, project)
        for index, (mlp_norm_E, next_norm_E) in enumerate(self.norms):
            qkv_THD = project(index, 0, x_TE).view(len(x_TE), -1, c.head_dim)
            attended_TE = project(index, 1, attend(index, qkv_THD, cos_T1D2, sin_T1D2).flatten(1))
            x_TE, total_TE = add_rms_norm(attended_TE, total_TE, mlp_norm_E, eps)
            h_TF = swiglu(*project(index, 2, x_TE).chunk(2, dim=1))
            x_TE, total_TE = add_rms_norm(project(index, 3, h_TF), total_TE, next_norm_E, eps)
        return x_TE

    def _with_numba(
        self,
        hidden: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        attend: StepAttention,
        project: Callable[[int, int, Tensor], Tensor],
    ) -> Tensor:
        """The layers with loops compiled for the CPU, from (normed, residual) hidden states. What lies between two
        products is written in place: for one row, allocating a tensor takes as long as the arithmetic."""
        x_TE, total_TE = hidden
        c, T, total, eps = self.config, len(x_TE), total_TE.numpy(), np.float32(self.config.rms_norm_eps)
        cos, sin = (x[:, 0].numpy() for x in rope)
        out_THD, h_TF = x_TE.new_empty(T, c.num_heads, c.head_dim), x_TE.new_empty(T, c.intermediate_size)
        out_TO, h = out_THD.view(T, -1), h_TF.numpy()
        for index, (mlp_norm, next_norm) in enumerate(self.norms):
            attend.into(out_THD, index, project(index, 0, x_TE).view(T, -1, c.head_dim), cos, sin)
            x_TE = project(index, 1, out_TO)
            cpu_layer.add_rms_norm(x_TE.numpy(), total, mlp_norm, eps)
            cpu_layer.swiglu(project(index, 2, x_TE).numpy(), h)
            x_TE = project(index, 3, h_TF)
            cpu_layer.add_rms_norm(x_TE.numpy(), total, next_norm, eps)
        return x_TE


def join(weights: Sequence[Tensor]) -> Tensor:
    """One (sum of O, I) matrix of several layers' weights, which become views of it."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    sizes = [len(w) for w in weights]
    ends = [w.data_ptr() + w.numel() * w.element_size() for w in weights]
    if ends[:-1] == [w.data_ptr() for w in weights[1:]] and len({w.untyped_storage().data_ptr() for w in weights}) == 1:
        return first.as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))  # already joined
    joined_OI = torch.cat([w.detach() for w in weights])
    for w, part in zip(weights, joined_OI.split(sizes), strict=True):
        w.data = part
    return joined_OI


def linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x W^T. On a CPU, for two to six rows, as (W x^T)^T, which takes the library two thirds of the time."""
    if x_TI.is_cuda or not 2 <= x_TI.shape[0] <= 6:
        return torch.nn.functional.linear(x_TI, w_OI)
    return (w_OI @ x_TI.t()).t().contiguous()


def half_width_product(w_OI: Tensor) -> Product:
    """x (T, I) in float32 -> x W^T in float32, over a 16-bit weight, on a CPU.

    FBGEMM's product over packed float16 weights, widened in registers. bfloat16 weights are exact in float16 but for
    those below 2^-17 (an error of 2^-25 at most); a weight too large for float16 is widened once and for all, and so
    are all where torch has no FBGEMM."""
    packed = None
    if FBGEMM and float(w_OI.abs().max()) < 65504:
        packed = torch.ops.quantized.linear_prepack_fp16(w_OI.float(), None)
    if packed is None:
        wide_OI = w_OI.float()
        return lambda x_TI: torch.nn.functional.linear(x_TI, wide_OI)
    # Without the Python wrapper, which takes ten microseconds to look for overloaded arguments.
    product = torch.ops.quantized.linear_dynamic_fp16.default
    product = getattr(product, "_op", product)
    return lambda x_TI: product(x_TI, packed)
