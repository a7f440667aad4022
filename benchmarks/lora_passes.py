"""Launches and bytes of a LoRA layer's training step beyond its products, counted from shapes, without a GPU.

    python benchmarks/lora_passes.py                  Llama-2-7B's and Llama-3-8B's layer, folded and not, as a table
    python benchmarks/lora_passes.py --documents 20   with dropout, whose masks other layers draw by document

The layer's own code runs on a CPU with Triton's launches and the products replaced by nothing, so every launch comes
with the tensors that it gets. Counted are the bytes of activations (tensors with a row for each token), once for each
tensor that a launch reads or writes, twice for one that it reads and writes; of a product only what it reads beyond its
two factors: the value that it adds to. Attention's launches count, its bytes do not. Sums of the adapters' gradients by
shares of tokens are told apart. What an optimizer step brings (the folded adapters written anew) is in no layer's pass.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptst.kernels.attention import packed_attention
from ptst.kernels.lora_layer import Dropout
from ptst.kernels.operators import OPERATORS
from ptst.kernels.rope import frequencies, tables
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder, Layer
from ptst.model.fold import fold_adapters
from ptst.model.lora import add_lora

LLAMA_2_7B = DecoderConfig(
    vocab_size=8, hidden_size=4096, intermediate_size=11008, num_layers=1, num_heads=32, num_kv_heads=32, head_dim=128,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=4096, sliding_window=None, tie_embeddings=True,
)  # fmt: skip
LLAMA_3_8B = DecoderConfig(
    vocab_size=8, hidden_size=4096, intermediate_size=14336, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128,
    rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=None, max_positions=8192, sliding_window=None, tie_embeddings=True,
)  # fmt: skip
ATTENTION = ("flash_forward.forward", "flash_backward.delta", "flash_backward.dq", "flash_backward.dkdv")
# Arguments that are read and those that are written in their place: where the two are one tensor, it counts twice.
IN_PLACE = {"lora._expand": [(0, 0)], "rope._rotate": [(0, 2), (1, 3)]}
SUMS = ("lora._weight_gradient", "folded_kernels.gradients", "folded_kernels.swiglu_backward")
PRODUCTS = ("mm", "addmm", "addmm_")
FREE = {  # these launch nothing: they make tensors, or views of them
    *("empty", "new_empty", "empty_like", "view", "_unsafe_view", "t", "transpose", "slice", "split", "detach"),
    *("split_with_sizes", "alias", "expand", "unsqueeze", "squeeze", "as_strided", "permute", "select"),
    *("unflatten", "promote_types"),
}  # fmt: skip


@dataclass
class Counts:
    """Launches and bytes of activations, by name; bytes of partial sums; products."""

    tokens: int
    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    sums: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def add(self, name: str, tensors: Iterable[Tensor], again: Sequence[Tensor] = ()) -> None:
        """A launch with these arguments, `again` those that it reads and writes."""
        self.launches[name] += 1
        if name in ATTENTION:
            return
        different = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
        for t in (*different.values(), *again):
            size = t.numel() * t.element_size()
            if t.dim() and len(t) == self.tokens:
                self.bytes[name] += size
            elif name in SUMS and t.dtype == torch.float32 and t.dim() > 1:
                self.sums += size


Ways = tuple[Counts, Counts]  # forward, backward


class _Counting(TorchDispatchMode):
    """Notes torch's launches; products are not computed."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace == "ptst":  # the launches inside
            with self:
                return (OPERATORS.get(func.name()) or OPDEFS[func.name()])._init_fn(*args, **kwargs)
        if name in PRODUCTS:
            return self._product(name, args)
        out = func(*args, **kwargs)
        if name not in FREE:
            self.counts.add(name, [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)])
        return out

    def _product(self, name: str, args: tuple[Tensor, ...]) -> Tensor:
        self.counts.products += 1
        a, b = args[-2:]
        out = args[0] if name == "addmm_" else a.new_empty(len(a), b.shape[1])
        if name == "addmm" and args[0].dim() == 2:  # the product adds in place: torch copies the value first
            self.counts.add("copy before a product", [args[0], out])
        if name == "addmm_" or (name == "addmm" and args[0].dim() == 2):
            self.counts.bytes["read by a product to add to"] += out.numel() * out.element_size()
        return out


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Triton's launches are noted, and do nothing."""
    from triton.runtime import interpreter

    def launch(self, *args, **_named):  # type: ignore[no-untyped-def]
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        again = [args[i] for i, to in IN_PLACE.get(name, []) if args[i].data_ptr() == args[to].data_ptr()]
        counts.add(name, [t for t in args if isinstance(t, Tensor)], again)

    ways = mock.patch.dict(os.environ, {"PTST_KERNELS": "triton"})
    with ways, mock.patch.object(interpreter.GridExecutor, "__call__", launch), _Counting(counts):
        yield


def count(config: DecoderConfig, tokens: int, rank: int, folded: bool, documents: int = 0) -> Ways:
    """Of a layer with LoRA on all seven projections over a bfloat16 base, adapters in float32; with dropout over so
    many `documents`, of equal lengths."""
    decoder = Decoder(config).requires_grad_(False).bfloat16()
    add_lora(decoder, LoraConfig(rank, 2.0 * rank))
    if folded:
        with mock.patch.dict(os.environ, {"PTST_KERNELS": "triton"}):
            assert fold_adapters(decoder) == 4
    layer = decoder.layers[0]
    assert isinstance(layer, Layer)
    adapters = [p for name, p in layer.named_parameters() if ".lora_" in name]
    x_TE = torch.zeros(tokens, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    cos, sin = tables(torch.arange(tokens), frequencies(config.head_dim, config.rope_theta))

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, [0, tokens])

    bounds = [i * tokens // documents for i in range(documents + 1)] if documents else []
    dropout = Dropout(0.05, tuple(range(documents)), tuple(bounds)) if documents else None
    for _ in range(2):  # the first time, attention makes its tables, once for all layers
        forward, backward = Counts(tokens), Counts(tokens)
        with counting(forward):
            out = layer(x_TE, 0, cos, sin, attend, dropout)
        gradient = torch.zeros_like(out)
        with counting(backward):
            torch.autograd.grad(out, [x_TE, *adapters], gradient)
    return forward, backward


def rows(config: DecoderConfig, tokens: int, rank: int, documents: int) -> tuple[list[list[str]], Ways, Ways]:
    """Of the table: launches and megabytes before and after, by direction and in all; and what was counted."""
    before, after = (count(config, tokens, rank, folded, documents) for folded in (False, True))
    found = []
    for name, numbers in (("forward", (0,)), ("backward", (1,)), ("both", (0, 1))):
        launches = [sum(sum(c[i].launches.values()) for i in numbers) for c in (before, after)]
        size = [sum(c[i].total for i in numbers) / 1e6 for c in (before, after)]
        sums = [sum(c[i].sums for i in numbers) / 1e6 for c in (before, after)]
        less = f"{1 - size[1] / size[0]:.0%}"
        found.append([name, *map(str, launches), *(f"{x:,.0f}" for x in size), less, *(f"{x:,.0f}" for x in sums)])
    return found, before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--documents", type=int, default=0, help="with dropout of 0.05 over so many documents")
    parser.add_argument("-v", "--verbose", action="store_true", help="each launch")
    args = parser.parse_args()
    print("| layer | pass | launches | folded | MB of activations | folded | less | MB of sums | folded |")
    print("|" + "---|" * 9)
    for model, config in (("Llama-2-7B", LLAMA_2_7B), ("Llama-3-8B", LLAMA_3_8B)):
        table, *ways = rows(config, args.tokens, args.rank, args.documents)
        for row in table:
            print(f"| {' | '.join([model, *row])} |")
        for way, counts in zip(("today", "folded"), ways, strict=True) if args.verbose else ():
            for direction, c in zip(("forward", "backward"), counts, strict=True):
                print(f"\n{model} {way} {direction}: {c.products} products")
                for name in {**c.launches, **c.bytes}:
                    print(f"  {c.launches[name]:3d} {name:32} {c.bytes[name] / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
