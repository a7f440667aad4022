"""The fused training step against plain autograd of the definition, in float64; dropout; activation checkpointing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptst.kernels.dispatch import triton
from ptst.kernels.lora import Projections
from ptst.kernels.lora_layer import Dropout, lora_add, lora_feed_forward, lora_qkv
from ptst.kernels.rope import frequencies, tables
from ptst.model.config import TARGETS, DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, read_lora_config, save_adapter
from ptst.model.rope_config import LinearScaling, Rope, YarnScaling
from tests.kernels import interpreter

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=64, sliding_window=None, tie_embeddings=True,
)  # fmt: skip
# What families change, in combinations that show all of it: layers differ in their windows and rotary embeddings.
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "qwen2": {"qkv_bias": True, "sliding_window": 3, "full_attention": (0, 2)},
    "qwen3": {"qk_norm": "head", "rope_scaling": YarnScaling(4.0, 8, 3.0, 1.0, 2.0, False)},
    "smollm3": {"no_rope": (1,), "rope_scaling": LinearScaling(2.0)},
    "olmo3": {
        "qk_norm": "projection", "post_norm": True, "sliding_window": 3, "full_attention": (2,),
        "rope_scaling": YarnScaling(4.0, 8, 3.0, 1.0, 2.0, True), "sliding_rope": Rope(100.0),
    },
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = [0, 5, 6, 13]
TOKENS = torch.arange(BOUNDS[-1]) * 7 % 50


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "reference")


def model(
    targets=TARGETS, dropout: float = 0.0, layers: int = 3, switches: str = "none"
) -> tuple[Decoder, dict[str, torch.nn.Parameter]]:
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, num_layers=layers, **SWITCHES[switches])).double().requires_grad_(False)
    for name, p in decoder.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    parameters = add_lora(decoder, LoraConfig(3, 6.0, tuple(targets), dropout=dropout))
    for p in parameters.values():
        torch.nn.init.normal_(p, std=0.3)
    return decoder, parameters


def definition(decoder: Decoder) -> torch.Tensor:
    """Hidden states by the book: every token sees its own document up to itself, or the window of it; W + scale B A in
    each projection; and the switches of the decoder's config."""
    c = decoder.config
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])
    own = torch.block_diag(*(torch.ones(b - a, b - a) for a, b in pairwise(BOUNDS))).tril().bool()

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight

    def linear(x, layer):
        w = layer.weight + (layer.scale * layer.lora_B @ layer.lora_A if hasattr(layer, "lora_A") else 0)
        return x @ w.t() + (0 if layer.bias is None else layer.bias)

    def heads(x, layer):
        size = c.head_dim if c.qk_norm == "head" else x.shape[1]
        x = x if layer is None else norm(x.unflatten(1, (-1, size)), layer).flatten(1)
        return x.unflatten(1, (-1, c.head_dim))

    def rotated(x, rope):
        if rope is None:
            return x
        cos, sin = (t.double() for t in tables(positions, frequencies(c.head_dim, rope.theta, rope.scaling)))
        a, b = x.chunk(2, dim=-1)
        stretch = getattr(rope.scaling, "attention_factor", 1.0)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) * torch.tensor(stretch).double()

    def attention(n, a, index):
        rope = c.rope(index)
        q = rotated(heads(linear(n, a.q_proj), a.q_norm), rope)
        k, v = rotated(heads(linear(n, a.k_proj), a.k_norm), rope), heads(linear(n, a.v_proj), None)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        seen = own if c.window(index) is None else own.triu(1 - c.window(index))
        scores = torch.einsum("ihd,jhd->hij", q, k) / c.head_dim**0.5
        scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return linear(torch.einsum("hij,jhd->ihd", scores, v).flatten(1), a.o_proj)

    def feed_forward(n, m):
        g = linear(n, m.gate_proj)
        return linear(g * torch.sigmoid(g) * linear(n, m.up_proj), m.down_proj)

    x = decoder.embed_tokens(TOKENS)
    for index, layer in enumerate(decoder.layers):
        if c.post_norm:
            x = x + norm(attention(x, layer.self_attn, index), layer.post_attention_layernorm)
            x = x + norm(feed_forward(x, layer.mlp), layer.post_feedforward_layernorm)
        else:
            x = x + attention(norm(x, layer.input_layernorm), layer.self_attn, index)
            x = x + feed_forward(norm(x, layer.post_attention_layernorm), layer.mlp)
    return norm(x, decoder.norm)


def gradients(decoder, parameters, hidden: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    decoder.zero_grad()
    (hidden * weight).sum().backward()
    return [p.grad.clone() for p in parameters.values()]


def assert_close(ours: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",), ("o_proj", "up_proj")])
def test_gradients_are_those_of_the_definition(targets, switches):
    decoder, parameters = model(targets, switches=switches)
    ours, exact = decoder.documents(TOKENS, BOUNDS), definition(decoder)
    assert (ours - exact).norm() <= 1e-12 * exact.norm()
    assert_close(gradients(decoder, parameters, ours), gradients(decoder, parameters, exact))
    with torch.no_grad():  # and the way without a backward pass, which the sampler takes
        assert (decoder.documents(TOKENS, BOUNDS) - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("switches", SWITCHES)
def test_full_fine_tuning_is_exact_too(switches):
    torch.manual_seed(1)
    decoder = Decoder(replace(CONFIG, **SWITCHES[switches])).double()
    parameters = dict(decoder.named_parameters())
    ours = gradients(decoder, parameters, decoder.documents(TOKENS, BOUNDS))
    assert_close(ours, gradients(decoder, parameters, definition(decoder)), 1e-11)


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, (5, 9), (0, 2, 6))])
def test_gradcheck(dropout):
    def leaves(*sizes):
        return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)

    T, E, F = 6, 8, 10
    norm = torch.rand(E, dtype=torch.float64) + 0.5
    biases = [torch.randn(8, dtype=torch.float64), None, torch.randn(4, dtype=torch.float64)]
    base = [torch.randn(s, dtype=torch.float64) for s in ((8, E), (4, E), (4, E))]
    wide = [torch.randn(s, dtype=torch.float64) for s in ((F, E), (F, E), (E, F))]

    def qkv(x, a, b, c, d):
        return lora_qkv(x, norm, 1e-5, Projections(base, [(a, b), None, (c, d)], 0.5), dropout)

    def biased_qkv(x, a, b, c, d):
        return lora_qkv(x, None, 0.0, Projections(base, [(a, b), None, (c, d)], 0.5, biases=biases), dropout)

    def feed_forward(x, a, b, c, d, e, f, without_norm=False):
        return lora_feed_forward(
            x, None if without_norm else norm, 1e-5, Projections(wide, [(a, b), (c, d), (e, f)], 0.5), dropout
        )

    def add(r, x, a, b):
        return lora_add(r, x, Projections([wide[2]], [(a, b)], 0.5), dropout)

    check = partial(torch.autograd.gradcheck, fast_mode=True)
    for function in (qkv, biased_qkv):
        assert check(function, leaves((T, E), (2, E), (8, 2), (1, E), (4, 1)))
    for function in (feed_forward, partial(feed_forward, without_norm=True)):
        assert check(function, leaves((T, E), (2, E), (F, 2), (2, E), (F, 2), (2, F), (E, 2)))
    assert check(add, leaves((T, E), (T, F), (2, F), (E, 2)))


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_computed_below_the_first_adapter():
    """The first layer's q, k and v need no gradient of their input: three products fewer, and three joinings of an
    adapter to its weight before them."""
    counts = []
    for needed in (False, True):
        decoder, _ = model()
        decoder.embed_tokens.weight.requires_grad_(needed)
        hidden = decoder.documents(TOKENS, BOUNDS)
        with _Products() as products:
            hidden.sum().backward()
        counts.append(products.count)
        assert (decoder.embed_tokens.weight.grad is not None) == needed
        assert all(p.grad is None for name, p in decoder.named_parameters() if "norm" in name)
    assert counts[1] - counts[0] == 6


def test_dropout_does_not_depend_on_the_split():
    """One row of three documents, or three rows in another order: the same gradient."""
    decoder, parameters = model(dropout=0.4)
    seeds = [11, 12, 13]
    weight = torch.linspace(-1, 1, BOUNDS[-1] * CONFIG.hidden_size, dtype=torch.float64).view(-1, CONFIG.hidden_size)
    decoder.dropout_seeds = seeds
    (decoder.documents(TOKENS, BOUNDS) * weight).sum().backward()
    together = [p.grad.clone() for p in parameters.values()]
    decoder.zero_grad()
    for i in (2, 0, 1):
        a, b = BOUNDS[i], BOUNDS[i + 1]
        decoder.dropout_seeds = [seeds[i]]
        (decoder.documents(TOKENS[a:b], [0, b - a]) * weight[a:b]).sum().backward()
    assert_close([p.grad for p in parameters.values()], together)
    decoder.dropout_seeds = [11, 12, 14]
    other = gradients(decoder, parameters, decoder.documents(TOKENS, BOUNDS))
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(other, together, strict=True))


def test_dropout_masks():
    """Zeros and 1 / (1 - p) at the rate asked for, another mask for every seed, layer and place."""
    like = torch.empty(400, 50)
    masks = [
        Dropout(0.25, (seed,), (0, 400), layer).mask(place, like)
        for seed in (1, 2) for layer in (0, 1) for place in ("qkv", "down")
    ]  # fmt: skip
    for i, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((mask == 0).float().mean() - 0.25) < 0.02  # 20,000 draws: a standard error of 0.003
        assert all(0.5 < (mask == other).float().mean() < 0.75 for other in masks[:i])  # 0.625 if independent


def test_dropout_is_right_on_average():
    x, w = torch.randn(4, 12, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    a, b = torch.randn(3, 12, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    zero = torch.zeros(4, 6, dtype=torch.float64)
    layer = Projections([w], [(a, b)], 0.5)
    plain = lora_add(zero, x, layer)
    draws = torch.stack([lora_add(zero, x, layer, Dropout(0.5, (s,), (0, 4))) for s in range(2000)])
    assert ((draws.mean(0) - plain).abs() <= 5 * draws.std(0) / 2000**0.5).all()
    assert (draws.std(0) > 0.05).all()


def test_no_dropout_is_the_same_as_none():
    decoder, parameters = model()
    plain = gradients(decoder, parameters, decoder.documents(TOKENS, BOUNDS))
    for rate, seeds in ((0.0, [1, 2, 3]), (0.3, None)):
        decoder.lora_dropout, decoder.dropout_seeds = rate, seeds
        again = gradients(decoder, parameters, decoder.documents(TOKENS, BOUNDS))
        assert all(torch.equal(x, y) for x, y in zip(again, plain, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout):
    results = []
    for activation_checkpointing in (False, True):
        decoder, parameters = model(dropout=dropout)
        decoder.dropout_seeds, decoder.activation_checkpointing = [1, 2, 3], activation_checkpointing
        results.append(gradients(decoder, parameters, decoder.documents(TOKENS, BOUNDS)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(triton is None, reason="Triton is for Linux")
@pytest.mark.parametrize("switches", ["none", "qwen2", "olmo3"])
def test_the_same_through_triton(switches, monkeypatch):
    """Float32 through the kernels, with gradients as near to float64's as plain torch's in float32, threefold; on the
    GPU where there is one."""
    results = []
    for way, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        monkeypatch.setenv("PTST_KERNELS", way)
        if way == "triton" and DEVICE == "cpu":
            interpreter.install()
        decoder, parameters = model(dropout=0.3, layers=1, switches=switches)
        if dtype == torch.float64:  # the masks are those of float32
            monkeypatch.setattr(Dropout, "mask", _mask_of_float32)
        decoder = decoder.to(DEVICE, dtype)
        decoder.dropout_seeds = [1, 2, 3]
        results.append(gradients(decoder, parameters, decoder.documents(TOKENS.to(DEVICE), BOUNDS)))
        monkeypatch.undo()
    for exact, eager, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 3 * (eager - exact).norm() + 1e-6 * exact.norm()


def _mask_of_float32(self, place, like, mask=Dropout.mask):
    return mask(self, place, like.float()).to(like.dtype)


WAYS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="Triton is for Linux"))]


@pytest.mark.parametrize("way", WAYS)
def test_an_upstream_gradient_that_is_a_view(way, monkeypatch):
    """Expanded, transposed or a slice, it is read as what it says."""
    monkeypatch.setenv("PTST_KERNELS", way)
    if way == "triton" and DEVICE == "cpu":
        interpreter.install()
    T, E, F = 6, 8, 20
    norm, *weights = (torch.randn(s, device=DEVICE) for s in ((E,), (F, E), (F, E), (E, F)))
    shapes = ((T, E), (2, E), (F, 2), (2, E), (F, 2), (2, F), (E, 2))
    leaves = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
    out = lora_feed_forward(leaves[0], norm, 1e-5, Projections.from_flat(weights, leaves[1:], 0.5))
    for given in (torch.randn(8, 6).t(), torch.randn(6, 16)[:, :8], torch.randn(1, 1).expand(6, 8)):
        given = given.to(DEVICE)
        grads = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (given, given.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_small_adapter_is_not_lost_in_a_half_precision_base(way, monkeypatch):
    """Its part of a weight is below the weight's rounding. The residual takes away the base's part, exactly."""
    monkeypatch.setenv("PTST_KERNELS", way)
    if way == "triton" and DEVICE == "cpu":
        interpreter.install()
    x, w = (torch.full(s, v, device=DEVICE, dtype=torch.bfloat16) for s, v in (((6, 20), 1 / 16), ((8, 20), 1.0)))
    adapter = torch.ones(1, 20, device=DEVICE), torch.ones(8, 1, device=DEVICE)
    residual = torch.full((6, 8), -20 / 16, device=DEVICE, dtype=torch.bfloat16)
    out = lora_add(residual, x, Projections([w], [adapter], 2.0**-11)).float()
    assert (out - 2.0**-11 * 20 / 16).abs().max() <= 2.0**-11 * 0.01


def test_mistakes(tmp_path):
    decoder, _ = model(dropout=0.1)
    decoder.dropout_seeds = [1]
    with pytest.raises(ValueError, match="1 dropout seeds for 3 documents"):
        decoder.documents(TOKENS, BOUNDS)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        LoraConfig(dropout=1.0)
    save_adapter(decoder, tmp_path, LoraConfig(3, 6.0, dropout=0.1), "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert read_lora_config(tmp_path).dropout == 0.1
