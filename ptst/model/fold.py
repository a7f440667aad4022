"""Adapters folded beside their frozen weights (kernels/folded_layer.py), for training on a GPU.

A folded projection's weight is a view of a matrix with columns for its adapter, which cost `ranks / inputs` of its
memory; values, names and files stay the same. Decoder layers take the folded way while nothing has been moved or
replaced since.
"""

from torch import Tensor, nn

from ptst.kernels.dispatch import DTYPES, use_triton
from ptst.kernels.folded_layer import FoldedGroup
from ptst.kernels.lora_folded import ALIGNED, MOST_RANKS, WIDEST_GROUP
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder, Folded, Layer, LoraLinear, projections

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def fold_adapters(decoder: Decoder) -> int:
    """Fold what can be folded; returns how many groups of projections were. Not those that are sharded, quantized,
    trained themselves, without an adapter or of more ranks than the kernels take, nor layers whose norms come after
    their blocks; and nothing where Triton does not run."""
    if decoder.sharded or decoder.config.post_norm or not use_triton(decoder.head_VE):
        return 0
    folded = 0
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        attn, mlp = layer.self_attn, layer.mlp
        groups = [_fold(attn.q_proj, attn.k_proj, attn.v_proj), _fold(attn.o_proj)]
        both = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]  # the two groups are one function
        groups += [_fold(*group) for group in both] if all(_fits(*group) for group in both) else [None, None]
        layer.folded = Folded(*groups)
        folded += sum(group is not None for group in groups)
    return folded


def _fits(*layers: nn.Module) -> bool:
    """Whether a group can be folded."""
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    ranks = [len(layer.lora_A) for layer in adapted]
    weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
    plain = all(type(w.data) is Tensor and w.dtype in DTYPES and not w.requires_grad for w in weights)
    return plain and foldable(ranks) and len({layer.scale for layer in adapted}) == 1


def foldable(ranks: list[int]) -> bool:
    """Whether the kernels take a group of adapters of these ranks."""
    return bool(ranks) and max(ranks) <= MOST_RANKS and filled(ranks) <= WIDEST_GROUP


def filled(ranks: list[int]) -> int:
    """Columns for these ranks."""
    return -(-sum(ranks) // ALIGNED) * ALIGNED


def _fold(*layers: nn.Linear | LoraLinear) -> FoldedGroup | None:
    if not _fits(*layers):
        return None
    weights, adapters, scale, _, biases = projections(*layers)
    group = FoldedGroup([w.detach() for w in weights], adapters, scale, biases)
    for layer, view in zip(layers, group.weights, strict=True):
        layer.weight.data = view
    return group


def fold_bytes(config: DecoderConfig, lora: LoraConfig, shapes: dict[str, tuple[int, int]], size: int) -> int:
    """Bytes that folding takes beyond the weights, of elements of `size` bytes; `shapes`: (outputs, inputs) by
    projection."""
    if config.post_norm:
        return 0
    ranks = [[lora.rank for name in group if name in lora.targets] for group in GROUPS]
    if not (foldable(ranks[2]) and foldable(ranks[3])):
        ranks[2:] = [[], []]
    total = 0
    for group, of_group in zip(GROUPS, ranks, strict=True):
        if foldable(of_group):
            total += filled(of_group) * (sum(shapes[name][0] for name in group) + shapes[group[0]][1])
    return config.num_layers * total * size
