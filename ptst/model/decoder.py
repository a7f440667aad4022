"""The decoder: one forward pass for training, prefill and decoding, and for every family of models.

Documents are packed into one sequence, without a batch axis and without padding. Which tokens a token attends to is
decided by `attend`, a function that the caller passes: documents of a packed sequence, or a KV cache. The decoder
itself knows only tokens and their `position_ids`. Parameters have Hugging Face's names, so files on disk need no
translation.

A projection is linear, with a LoRA adapter (`LoraLinear`) or without one. Families differ in switches of DecoderConfig:
biases, norms of queries and keys, norms after a block instead of before it, windows and rotary embeddings by layer.

The mathematics of a layer is written down four times, each for another purpose; tests/model/test_layer_paths.py runs
the same weights through all four and compares them with float64:

- `Layer.forward` in ptst/model/decoder.py: the plain definition; full fine-tuning and evaluation use it.
- `Layer._lora_forward` over kernels/lora_layer.py: training with adapters over a frozen base, which saves memory; on a
  GPU over kernels/folded_layer.py, which saves passes.
- `Forward` in ptst/generation/forward.py: sampling, with joined projections (q|k|v, gate|up), in torch or Triton.
- `Forward._with_numba` over kernels/cpu_layer.py and kernels/cpu_attention.py: sampling on a CPU, loops by Numba.

Shapes: T tokens, E hidden_size, F intermediate_size, H query heads, K key/value heads, D head_dim, V
vocabulary; I inputs and O outputs of a projection, r rank.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptst.errors import UserError
from ptst.kernels.attention import SharedPrefixes, packed_attention
from ptst.kernels.dispatch import use_triton
from ptst.kernels.folded_layer import FoldedGroup, folded_add, folded_feed_forward, folded_qkv
from ptst.kernels.lora import Projections, lora_group
from ptst.kernels.lora_layer import Dropout, lora_add, lora_feed_forward, lora_qkv
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, tables
from ptst.kernels.swiglu import swiglu
from ptst.kernels.transfer import to_device
from ptst.model.config import DecoderConfig

# attend(layer index, q_THD, k_TKD, v_TKD) -> out_THD
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class LoraLinear(nn.Module):
    """A frozen linear layer and a LoRA adapter, float32 (or float64) over a base of any dtype, on `device`, by default
    the base's."""

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scale: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        out_features, in_features = base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        device = device or base.weight.device
        # As in the paper (section 4.1) A is random and B is zero: training starts exactly from the base model. The
        # bound is PEFT's (Kaiming uniform with a = sqrt(5)).
        a_rI = torch.empty(rank, in_features, dtype=dtype)
        a_rI.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
        self.lora_A = nn.Parameter(a_rI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))

    def forward(self, x_TI: Tensor) -> Tensor:
        return project(x_TI, self)[0]


def project(x_TI: Tensor, *layers: nn.Linear | LoraLinear) -> tuple[Tensor, ...]:
    """Every layer's output (T, O) for one input, which the adapters read once."""
    if not any(isinstance(layer, LoraLinear) for layer in layers):
        return tuple(layer(x_TI) for layer in layers)
    weights, adapters, scale, _, biases = projections(*layers)
    return lora_group(x_TI, weights, adapters, scale, biases)


def projections(*layers: nn.Linear | LoraLinear) -> Projections:
    """The layers' weights, biases, adapters and scale, as kernels/lora.py and kernels/lora_layer.py take them."""
    adapters = [(layer.lora_A, layer.lora_B) if isinstance(layer, LoraLinear) else None for layer in layers]
    scale = next((layer.scale for layer in layers if isinstance(layer, LoraLinear)), 1.0)
    biases = [layer.bias for layer in layers]
    biases = biases if any(bias is not None for bias in biases) else []
    return Projections([layer.weight for layer in layers], adapters, scale, biases=biases)


def _held(group: FoldedGroup | None, *layers: nn.Linear | LoraLinear) -> FoldedGroup | None:
    """The group if it still holds these layers."""
    if group is None:
        return None
    weights, adapters, *_ = projections(*layers)
    return group if group.holds(weights, adapters) else None


class Ropes:
    """The rotary embedding of each layer; what layers have in common is computed once per forward pass."""

    def __init__(self, config: DecoderConfig, device: torch.device):
        kinds = config.ropes
        self.kind_of_layer = [kinds.index(config.rope(layer)) for layer in range(config.num_layers)]
        self.device = device
        D, none = config.head_dim, torch.zeros(config.head_dim // 2)
        # Without a rotary embedding all frequencies are zero: a rotation by no angle changes nothing.
        of_kinds = [none if r is None else frequencies(D, r.theta, r.scaling) for r in kinds]
        self._frequencies = [to_device(frequencies_D2, device) for frequencies_D2 in of_kinds]
        self._factors = [getattr(r and r.scaling, "attention_factor", 1.0) for r in kinds]

    def tables(self, position_ids_T: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin, (T, 1, D/2) each, of each kind in `kind_of_layer`."""
        kinds = zip(self._frequencies, self._factors, strict=True)
        return [tables(position_ids_T, frequencies_D2, factor) for frequencies_D2, factor in kinds]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size, self.eps = size, eps

    def forward(self, x_TE: Tensor) -> Tensor:
        return rms_norm(x_TE, self.weight, self.eps)

    def add(self, x_TE: Tensor, residual_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return add_rms_norm(x_TE, residual_TE, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.head_dim, q, kv = c.head_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if c.qk_norm is not None:
            sizes = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q, kv)
            self.q_norm, self.k_norm = (RMSNorm(size, c.rms_norm_eps) for size in sizes)

    def forward(self, x_TE: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = self.heads(project(x_TE, self.q_proj, self.k_proj, self.v_proj), cos, sin)
        return self.o_proj(attend(layer, *heads).flatten(1))

    def heads(self, qkv: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, ready for attention, from the projections (T, O)."""
        q_TO, k_TO, v_TO = qkv
        if self.q_norm is not None and self.k_norm is not None:
            q_TO, k_TO = (
                norm(x.reshape(-1, norm.size)).view(x.shape) for norm, x in ((self.q_norm, q_TO), (self.k_norm, k_TO))
            )
        q_THD, k_TKD, v_TKD = self.by_head((q_TO, k_TO, v_TO))
        return *apply_rope(q_THD, k_TKD, cos, sin), v_TKD

    def by_head(self, qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(T, heads, D) of (T, O) each."""
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in qkv)


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.down_proj(swiglu(*project(x_TE, self.gate_proj, self.up_proj)))


class Folded(NamedTuple):
    """A layer's groups of projections with their adapters folded beside them, or None for one without (fold.py)."""

    qkv: FoldedGroup | None = None
    o: FoldedGroup | None = None
    gate_up: FoldedGroup | None = None
    down: FoldedGroup | None = None


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.post_norm, norm = config.post_norm, partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        if not self.post_norm:
            self.input_layernorm = norm()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm()
        self.mlp = FeedForward(config)
        if self.post_norm:
            self.post_feedforward_layernorm = norm()
        self.folded: Folded | None = None  # set by fold_adapters

    def forward(
        self, x_TE: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, dropout: Dropout | None = None
    ) -> Tensor:
        if dropout is not None or (torch.is_grad_enabled() and self._frozen_base):
            return self._lora_forward(x_TE, layer, cos, sin, attend, dropout)
        if self.post_norm:
            x_TE = x_TE + self.post_attention_layernorm(self.self_attn(x_TE, layer, cos, sin, attend))
            return x_TE + self.post_feedforward_layernorm(self.mlp(x_TE))
        attended_TE = self.self_attn(self.input_layernorm(x_TE), layer, cos, sin, attend)
        normed_TE, x_TE = self.post_attention_layernorm.add(attended_TE, x_TE)
        return x_TE + self.mlp(normed_TE)

    @property
    def _frozen_base(self) -> bool:
        """Whether only adapters are trained."""
        return not any(p.requires_grad for name, p in self.named_parameters() if ".lora_" not in name)

    def _lora_forward(
        self, x_TE: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, dropout: Dropout | None
    ) -> Tensor:
        """The same function with less kept for the backward pass; only adapters and x get gradients."""
        attn, mlp, eps = self.self_attn, self.mlp, self.post_attention_layernorm.eps
        if self.folded is not None and use_triton(x_TE):
            return self._folded_forward(x_TE, layer, cos, sin, attend, dropout)
        qkv, o = projections(attn.q_proj, attn.k_proj, attn.v_proj), projections(attn.o_proj)
        gate_up_down = projections(mlp.gate_proj, mlp.up_proj, mlp.down_proj)

        def attended(norm_E: Tensor | None) -> Tensor:
            heads = attn.heads(lora_qkv(x_TE, norm_E, eps, qkv, dropout), cos, sin)
            return attend(layer, *heads).flatten(1)

        if self.post_norm:
            x_TE = x_TE + self.post_attention_layernorm(lora_add(None, attended(None), o, dropout))
            return x_TE + self.post_feedforward_layernorm(lora_feed_forward(x_TE, None, eps, gate_up_down, dropout))
        x_TE = lora_add(x_TE, attended(self.input_layernorm.weight), o, dropout)
        return lora_feed_forward(x_TE, self.post_attention_layernorm.weight, eps, gate_up_down, dropout)

    def _folded_forward(
        self, x_TE: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, dropout: Dropout | None
    ) -> Tensor:
        """The same function in fewer passes over x, where adapters are folded."""
        attn, mlp, eps, folded = self.self_attn, self.mlp, self.post_attention_layernorm.eps, self.folded or Folded()
        norms = self.input_layernorm.weight, self.post_attention_layernorm.weight
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        group = _held(folded.qkv, *qkv)
        heads: tuple[Tensor, ...]
        if group is None:
            heads = attn.heads(lora_qkv(x_TE, norms[0], eps, projections(*qkv), dropout), cos, sin)
        elif attn.q_norm is not None:  # which comes before the rotation
            x_TE, *projected = folded_qkv(x_TE, norms[0], eps, group, dropout)
            heads = attn.heads(tuple(projected), cos, sin)
        else:
            x_TE, *projected = folded_qkv(x_TE, norms[0], eps, group, dropout, (cos, sin))
            heads = attn.by_head(tuple(projected))
        attended_TO = attend(layer, *heads).flatten(1)
        group = _held(folded.o, attn.o_proj)
        if group is not None:
            x_TE = folded_add(x_TE, attended_TO, group, dropout)
        else:
            x_TE = lora_add(x_TE, attended_TO, projections(attn.o_proj), dropout)
        gate_up, down = _held(folded.gate_up, mlp.gate_proj, mlp.up_proj), _held(folded.down, mlp.down_proj)
        if gate_up is not None and down is not None:
            return folded_feed_forward(x_TE, norms[1], eps, gate_up, down, dropout)
        layers = projections(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return lora_feed_forward(x_TE, norms[1], eps, layers, dropout)


class Decoder(nn.Module):
    """Embedding, layers and final norm. Callers apply the head (`head_VE`, the embedding itself if tied)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # On the device `meta` there is nothing to draw, and torch would import sympy, for a second, to draw it.
        empty_VE = torch.empty(config.vocab_size, config.hidden_size)
        given_VE = empty_VE if empty_VE.is_meta else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=given_VE)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lora_dropout = 0.0  # set by add_lora
        # One per document of the next micro-batch; None: no dropout, as in evaluation.
        self.dropout_seeds: list[int] | None = None
        self.activation_checkpointing = False  # backward recomputes each layer instead of keeping its activations
        self.sharded = False  # weights are spread over ranks, all of which must make every pass
        self._ropes: Ropes | None = None  # made on the tokens' device at the first call

    @property
    def head_VE(self) -> Tensor:
        """The output matrix (V, E)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self, tokens_T: Tensor, position_ids_T: Tensor, attend: Attend, dropout: Dropout | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (T, E)."""
        if self._ropes is None or self._ropes.device != tokens_T.device:
            self._ropes = Ropes(self.config, tokens_T.device)
        ropes, kinds = self._ropes.tables(position_ids_T), self._ropes.kind_of_layer
        x_TE = self.embed_tokens(tokens_T)
        for index, layer in enumerate(self.layers):
            inputs = (x_TE, index, *ropes[kinds[index]], attend, dropout and replace(dropout, layer=index))
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Dropout has its own seeds, so there is no random state to restore.
                x_TE = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TE = layer(*inputs)
        return self.norm(x_TE)

    def documents(
        self,
        tokens_T: Tensor,
        cu_seqlens: list[int],
        position_ids_T: Tensor | None = None,
        shared_prefixes: SharedPrefixes = (),
    ) -> Tensor:
        """Hidden states (T, E) of a packed sequence of documents, each at positions 0, 1, 2, ... by default.

        `shared_prefixes`: for each document (start, n), the n tokens of an earlier document that it begins with and
        does not repeat; its own positions then begin at n. Raises UserError for shared prefixes under LoRA dropout,
        ValueError unless there are as many `dropout_seeds` as documents."""
        if position_ids_T is None:
            offsets = [size for _, size in shared_prefixes] or [0] * (len(cu_seqlens) - 1)
            spans = zip(pairwise(cu_seqlens), offsets, strict=True)
            position_ids_T = torch.cat([torch.arange(n, n + b - a) for (a, b), n in spans])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = self.config.window(layer)
            return packed_attention(q, k, v, cu_seqlens, shared_prefixes=shared_prefixes, window=window)

        dropout = None
        if self.lora_dropout and self.dropout_seeds is not None:
            if shared_prefixes:
                raise UserError("documents cannot share prefixes under LoRA dropout: each has a mask of its own")
            dropout = Dropout(self.lora_dropout, tuple(self.dropout_seeds), tuple(cu_seqlens))
        return self(tokens_T, to_device(position_ids_T, tokens_T.device), attend, dropout)

    def logits(self, tokens_T: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """Logits (T, V) of packed documents; without `cu_seqlens` the tokens are one document. For tests and small
        inputs: training and sampling never form all of them."""
        bounds = [0, len(tokens_T)] if cu_seqlens is None else [int(b) for b in cu_seqlens]
        return self.documents(tokens_T, bounds) @ self.head_VE.t()
