"""The decoder's forward pass for generation: the same function as `Decoder.forward`, made fast for few tokens.

Projections that read the same input are one product (query | key | value, gate | up). The decoder's own weights become
views of the joined matrix, so that this takes no second copy. Adapters add their shrink and expand row by row.

On a CPU a bfloat16 (or float16) model is computed in float32, over a packed copy of its weights in 16 bits: reading
the weights is what decoding a few tokens costs. Most CPUs have no bfloat16 arithmetic, and the weights are widened
inside the product; a CPU with AMX multiplies bfloat16 weights with inputs rounded to bfloat16, as a GPU does. Where
memory has no room for a packed copy, and of a quantized base, there is none (lean_products.py). What lies between the
products runs in Numba's loops (kernels/cpu_layer.py).

Shapes: T tokens, N rows, E hidden_size, F intermediate_size, H query heads, K key/value heads, D head_dim, V
vocabulary; I inputs and O outputs of a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ptst.generation.kv_cache import cache_dtype
from ptst.generation.lean_products import quantized_product, room_to_pack, unpacked_product
from ptst.generation.multi_lora import GROUPS, Adapter, GroupLora, StackedLora, attached_adapter, group_adapter
from ptst.generation.paged_attention import StepAttention
from ptst.kernels import cpu_layer
from ptst.kernels.cpu import use_numba
from ptst.kernels.dispatch import use_triton
from ptst.kernels.multi_lora import add_adapters
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope_store import HeadNorms
from ptst.kernels.swiglu import swiglu
from ptst.model.decoder import Decoder, Layer, RMSNorm, Ropes
from ptst.model.quantized import QuantizedWeight

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
AMX = torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()  # matrix units for bfloat16

# (name of an adapter, None for the one attached to the decoder; its rows, None for all); or, where the forward pass has
# stacked them, the number of each row's adapter, -1 for none, int32 (T,).
AdapterRows = Sequence[tuple[str | None, Tensor | None]] | Tensor
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """`norms`: before attention and feed-forward block, or after each; `qk_norms`: of queries and keys."""

    products: list[Product]  # one for each of GROUPS
    norms: list[Tensor]
    qk_norms: list[Tensor]


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
        joined.append([_join_group([cast(nn.Linear, projections[leaf]) for leaf in group], dtype) for group in GROUPS])
    weights = [p for name, p in decoder.named_parameters() if ".lora_" not in name]
    made_of, quantized = None, any(isinstance(w, QuantizedWeight) for w in weights)
    if decoder.dtype != dtype and not any(quantized or w.requires_grad or w.is_inference() for w in weights):
        # A weight that was written to or replaced has another version or address.
        made_of = (dtype, *((w.data_ptr(), w._version) for w in weights))
    packed = _PACKED.pop(decoder, None)  # frees products of other weights before the new ones are made
    if packed is None or packed.made_of != made_of:
        packed = None
        out = []
        packs = decoder.dtype == dtype or quantized or room_to_pack(sum(w.nbytes for w in weights))
        product = partial(_product, dtype=dtype, packs=packs)
        for layer, groups in zip(layers, joined, strict=True):
            after = layer.post_attention_layernorm
            norms = (after, layer.post_feedforward_layernorm) if layer.post_norm else (layer.input_layernorm, after)
            qk_norms = layer.self_attn.q_norm, layer.self_attn.k_norm
            products = [product(w_OI, b_O) for w_OI, b_O in groups]
            out.append(_Layer(products, _norm_weights(norms, dtype), _norm_weights(qk_norms, dtype)))
        packed = _Prepared(made_of, out, product(decoder.head_VE.detach(), None))
    if made_of is not None:
        _PACKED[decoder] = packed
    return packed


def _norm_weights(norms: Sequence[RMSNorm | None], dtype: torch.dtype) -> list[Tensor]:
    return [norm.weight.detach().to(dtype) for norm in norms if norm is not None]


def _join_group(layers: Sequence[nn.Linear], dtype: torch.dtype) -> tuple[Tensor | list[Tensor], Tensor | None]:
    """One weight and one bias (None without) of several projections, with adapters or without; of quantized ones, all
    weights."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weights: list[Tensor] = [layer.weight for layer in layers]
    apart = any(isinstance(w_OI, QuantizedWeight) for w_OI in weights)
    return weights if apart else join(weights), join(biases).to(dtype) if biases else None


def _product(w_OI: Tensor | list[Tensor], b_O: Tensor | None, dtype: torch.dtype, packs: bool) -> Product:
    if isinstance(w_OI, list):
        return quantized_product(w_OI, b_O)
    if w_OI.dtype == dtype:
        return lambda x_TI: linear(x_TI, w_OI, b_O)
    return half_width_product(w_OI, b_O) if packs else unpacked_product(w_OI, b_O, AMX and w_OI.dtype == torch.bfloat16)


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
        self.ropes = Ropes(c, self.device)
        # Outside inference mode: the decoder's weights, which are replaced by views, must stay trainable.
        with torch.inference_mode(False), torch.no_grad():
            prepared = _prepare(decoder, self.dtype)
            self.layers, self.logits = prepared.layers, prepared.head  # logits: hidden states (N, E) -> (N, V)
            self.head_norms: list[HeadNorms] = []  # of each layer, for one kernel with what follows them (Qwen3)
            if c.qk_norm == "head":
                weights = [layer.qk_norms for layer in self.layers]
                self.head_norms = [HeadNorms(q_D, k_D, c.rms_norm_eps) for q_D, k_D in weights]
            # The norms after attention and after the feed-forward block of each layer; as arrays for Numba.
            norms = [norm for layer in self.layers for norm in layer.norms]
            norms = norms if c.post_norm else [*norms[1:], self.norm_E]
            pairs = list(zip(norms[::2], norms[1::2], strict=True))
            self.norms: list[tuple[Any, Any]] = [(a.numpy(), b.numpy()) for a, b in pairs] if self.numba else pairs
            self.adapters: dict[str | None, list[list[GroupLora | None]]] = {}
            if (attached := attached_adapter(decoder)) is not None:
                self.adapters[None] = group_adapter(attached, decoder, self.dtype)
            for name, adapter in (adapters or {}).items():
                self.adapters[name] = group_adapter(adapter, decoder, self.dtype)
            self.stacked = StackedLora(self.adapters) if self.adapters and use_triton(self.embedding_VE) else None

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, attend: StepAttention, adapter_rows: AdapterRows = ((None, None),)
    ) -> Tensor:
        """Hidden states (T, E) after the final norm. `attend` also stores the new keys and values, and
        normalizes queries and keys by head where it can."""
        c, eps = self.config, self.config.rms_norm_eps
        normed_later = attend.normalizes
        ropes = self.ropes.tables(positions_T)
        which_T = adapter_rows if isinstance(adapter_rows, Tensor) else None
        adapters = [] if isinstance(adapter_rows, Tensor) else self._named(adapter_rows)
        total_TE = self.embedding_VE[tokens_T].to(self.dtype)  # the residual stream
        x_TE = total_TE if c.post_norm else rms_norm(total_TE, self.layers[0].norms[0], eps)

        def project(index: int, group: int, x_TI: Tensor) -> Tensor:
            y_TO = self.layers[index].products[group](x_TI)
            if which_T is not None:
                assert self.stacked is not None, "numbers of adapters need stacked ones"
                if (stacked := self.stacked.layers[index][group]) is not None:
                    add_adapters(y_TO, x_TI, which_T, stacked)
            for layers, rows in adapters:
                lora = layers[index][group]
                if lora is not None:
                    lora.add_to(y_TO, x_TI, rows)
            return y_TO

        def add(y_TE: Tensor, total_TE: Tensor, norm_E: Tensor) -> tuple[Tensor, Tensor]:
            """(what the next block reads, the residual stream) after a block that returned y."""
            if not c.post_norm:
                return add_rms_norm(y_TE, total_TE, norm_E, eps)
            total_TE = total_TE + rms_norm(y_TE, norm_E, eps)
            return total_TE, total_TE

        if self.numba:
            x_TE = self._with_numba((x_TE, total_TE), ropes, attend, project)
            return rms_norm(x_TE, self.norm_E, eps) if c.post_norm else x_TE
        for index, (first_E, second_E) in enumerate(self.norms):
            qkv_TO = project(index, 0, x_TE)
            qkv_TO = qkv_TO if normed_later else self._qk_normed(index, qkv_TO)
            qkv_THD = qkv_TO.view(len(x_TE), -1, c.head_dim)
            attended_THD = attend(index, qkv_THD, *ropes[self.ropes.kind_of_layer[index]])
            x_TE, total_TE = add(project(index, 1, attended_THD.flatten(1)), total_TE, first_E)
            h_TF = swiglu(*project(index, 2, x_TE).chunk(2, dim=1))
            x_TE, total_TE = add(project(index, 3, h_TF), total_TE, second_E)
        return rms_norm(x_TE, self.norm_E, eps) if c.post_norm else x_TE

    def _named(self, rows: Sequence[tuple[str | None, Tensor | None]]) -> list:
        """(matrices, rows) of the adapters that this forward pass has."""
        return [(self.adapters[name], of_adapter) for name, of_adapter in rows if name in self.adapters]

    def _qk_normed(self, index: int, qkv_TO: Tensor) -> Tensor:
        """(T, (H + 2 K) D), queries and keys normalized where the model does that."""
        c, norms = self.config, self.layers[index].qk_norms
        if not norms:
            return qkv_TO
        *qk, v_TO = qkv_TO.split([c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2], dim=1)
        normed = [
            rms_norm(x_TO.reshape(-1, len(norm)), norm, c.rms_norm_eps).view(x_TO.shape)
            for x_TO, norm in zip(qk, norms, strict=True)
        ]
        return torch.cat((*normed, v_TO), dim=1)

    def _with_numba(
        self,
        hidden: tuple[Tensor, Tensor],
        ropes: Sequence[tuple[Tensor, Tensor]],
        attend: StepAttention,
        project: Callable[[int, int, Tensor], Tensor],
    ) -> Tensor:
        """The layers with loops compiled for the CPU, from (normed, residual) hidden states. What lies between two
        products is written in place: for one row, allocating a tensor takes as long as the arithmetic."""
        x_TE, total_TE = hidden
        c, T, total, eps = self.config, len(x_TE), total_TE.numpy(), np.float32(self.config.rms_norm_eps)
        tables = [(cos[:, 0].numpy(), sin[:, 0].numpy()) for cos, sin in ropes]
        add = cpu_layer.norm_add if c.post_norm else cpu_layer.add_rms_norm
        out_THD, h_TF = x_TE.new_empty(T, c.num_heads, c.head_dim), x_TE.new_empty(T, c.intermediate_size)
        out_TO, h = out_THD.view(T, -1), h_TF.numpy()
        for index, (first, second) in enumerate(self.norms):
            qkv_TO = project(index, 0, x_TE)
            if norms := self.layers[index].qk_norms:
                q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
                cpu_layer.norm_parts(qkv_TO[:, :q].numpy(), norms[0].numpy(), eps)
                cpu_layer.norm_parts(qkv_TO[:, q : q + kv].numpy(), norms[1].numpy(), eps)
            attend.into(out_THD, index, qkv_TO.view(T, -1, c.head_dim), *tables[self.ropes.kind_of_layer[index]])
            x_TE = project(index, 1, out_TO)
            add(x_TE.numpy(), total, first, eps)
            cpu_layer.swiglu(project(index, 2, x_TE).numpy(), h)
            x_TE = project(index, 3, h_TF)
            add(x_TE.numpy(), total, second, eps)
        return x_TE


def join(weights: Sequence[Tensor]) -> Tensor:
    """One (sum of O, I) matrix of several layers' weights, or (sum of O,) of their biases, which become views of it.
    Rows of one storage that follow each other stay where they are, be it joined or folded (model/fold.py)."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    sizes = [len(w) for w in weights]
    ends = [w.data_ptr() + len(w) * w.stride(0) * w.element_size() for w in weights]
    one = len({(w.untyped_storage().data_ptr(), w.stride()) for w in weights}) == 1
    if one and ends[:-1] == [w.data_ptr() for w in weights[1:]]:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    joined = torch.cat([w.detach() for w in weights])
    for w, part in zip(weights, joined.split(sizes), strict=True):
        w.data = part
    return joined


def linear(x_TI: Tensor, w_OI: Tensor, b_O: Tensor | None = None) -> Tensor:
    """x W^T + b. On a CPU, for two to six rows, as (W x^T)^T, which takes the library two thirds of the time."""
    if x_TI.is_cuda or not 2 <= x_TI.shape[0] <= 6:
        return nn.functional.linear(x_TI, w_OI, b_O)
    y_OT = w_OI @ x_TI.t() if b_O is None else torch.addmm(b_O[:, None], w_OI, x_TI.t())
    return y_OT.t().contiguous()


def half_width_product(w_OI: Tensor, b_O: Tensor | None = None) -> Product:
    """x (T, I) in float32 -> x W^T + b in float32, over a 16-bit weight and a bias in float32, on a CPU.

    FBGEMM's product over packed float16 weights, widened in registers. bfloat16 weights are exact in float16 but for
    those below 2^-17 (an error of 2^-25 at most); a weight too large for float16 is widened once and for all, and so
    are all where torch has no FBGEMM. With AMX, bfloat16 weights are multiplied as they are (`amx_product`)."""
    if AMX and w_OI.dtype == torch.bfloat16:
        return amx_product(w_OI, b_O)
    packed = None
    if FBGEMM and float(w_OI.abs().max()) < 65504:
        packed = torch.ops.quantized.linear_prepack_fp16(w_OI.float(), b_O)
    if packed is None:
        wide_OI = w_OI.float()
        return lambda x_TI: nn.functional.linear(x_TI, wide_OI, b_O)
    # Without the Python wrapper, which takes ten microseconds to look for overloaded arguments.
    product = torch.ops.quantized.linear_dynamic_fp16.default
    product = getattr(product, "_op", product)
    return lambda x_TI: product(x_TI, packed)


def amx_product(w_OI: Tensor, b_O: Tensor | None = None) -> Product:
    """x (T, I) in float32 -> x W^T + b in float32, over a bfloat16 weight, by oneDNN's packed product (AMX): x and
    the result are rounded to bfloat16, sums are float32. oneDNN compiles and keeps a program for every number of rows,
    so rows are filled up to a multiple of 16, or of an eighth of their number."""
    packed, half_O = torch.ops.mkldnn._reorder_linear_weight(w_OI, None), None if b_O is None else b_O.bfloat16()
    product = torch.ops.mkldnn._linear_pointwise.default
    product = getattr(product, "_op", product)

    def multiply(x_TI: Tensor) -> Tensor:
        num = len(x_TI)
        step = max(16, 1 << max(0, num.bit_length() - 4))
        x_RI = x_TI.new_zeros(-(-num // step) * step, x_TI.shape[1], dtype=torch.bfloat16)
        x_RI[:num] = x_TI
        return product(x_RI, packed, half_O, "none", [], "")[:num].float()

    return multiply
