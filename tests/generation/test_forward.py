"""The sampler's forward pass is the decoder's, in every dtype it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptst.generation import forward as module
from ptst.generation import lean_products
from ptst.generation.forward import Forward, half_width_product, join
from ptst.generation.kv_cache import KVCache
from ptst.generation.paged_attention import StepAttention
from ptst.kernels.cpu import use_numba
from ptst.model.decoder import Decoder
from ptst.model.weights import load_decoder
from ptst.progress import say_once
from tests.tiny import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hidden(decoder, tokens: list[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Through the cache, in three pieces of which the last is one token that is decoded."""
    forward = Forward(decoder)
    cache = KVCache(decoder.config, 8, dtype or forward.dtype, torch.device("cpu"))
    sequence = cache.allocate(len(tokens))
    outs = []
    for start, end in ((0, 5), (5, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
        cache.extend(sequence, end)
        decoding = [(sequence, end)] if end - start == 1 else []
        reading = [] if decoding else [(sequence, start, end - start)]
        attend = StepAttention(cache, decoding, reading, decoder.config)
        outs.append(forward(torch.tensor(tokens[start:end]), torch.arange(start, end), attend))
    return torch.cat(outs)


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}, {"tie_word_embeddings": False}])
def test_the_same_hidden_states(tmp_path, changes, way, monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", way)
    decoder = load_decoder(write_tiny_model(tmp_path, **changes))
    tokens = list(range(3, 90))
    with torch.inference_mode():
        ours = hidden(decoder, tokens)
        wanted = decoder.documents(torch.tensor(tokens), [0, len(tokens)])
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        logits = Forward(decoder).logits(ours)
        torch.testing.assert_close(logits, wanted @ decoder.head_VE.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fbgemm", [True, False])
def test_a_16_bit_model_is_computed_in_float32(tmp_path, fbgemm, monkeypatch):
    exact, half = rounded_model(write_tiny_model(tmp_path))
    monkeypatch.setattr(module, "AMX", False)
    if not fbgemm:
        monkeypatch.setattr(module, "FBGEMM", False)
    tokens = list(range(3, 90))
    with torch.inference_mode():
        torch.testing.assert_close(hidden(half, tokens), hidden(exact, tokens), rtol=1e-5, atol=1e-5)


def rounded_model(folder: Path) -> tuple[Decoder, Decoder]:
    """A model with weights of bfloat16, in float32 and in bfloat16."""
    exact, half = load_decoder(folder, torch.float32), load_decoder(folder, torch.bfloat16)
    for p, q in zip(exact.parameters(), half.parameters(), strict=True):
        p.data = q.data.float()
    return exact, half


@pytest.mark.skipif(not module.AMX, reason="needs a CPU with AMX")
def test_with_matrix_units_inputs_and_results_of_products_are_rounded_and_no_more(tmp_path):
    """Rows do not see each other, whatever their number is filled up to."""
    x, w, b = torch.randn(70, 48), torch.randn(24, 48).bfloat16(), torch.randn(24)
    for bias in (None, b):
        product = half_width_product(w, bias)
        half_x, half_b = x.bfloat16().double(), 0 if bias is None else b.bfloat16().double()
        wanted = half_x @ w.double().t() + half_b
        for num in (1, 15, 16, 17, 70):
            found = product(x[:num])
            assert found.dtype == torch.float32 and found.shape == (num, 24)
            torch.testing.assert_close(found.double(), wanted[:num], rtol=2**-8, atol=1e-5)
            assert torch.equal(found, product(x)[:num])
    exact, half = rounded_model(write_tiny_model(tmp_path))
    tokens = list(range(3, 90))
    with torch.inference_mode():
        ours, wanted = hidden(half, tokens), hidden(exact, tokens)
    assert 1e-4 < (ours - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.skipif(not use_numba(torch.empty(0)), reason="Numba is not installed")
def test_a_16_bit_model_keeps_16_bit_keys_and_values(tmp_path, monkeypatch):
    decoder = load_decoder(write_tiny_model(tmp_path), torch.bfloat16)
    assert Forward(decoder).cache_dtype == torch.bfloat16
    tokens = list(range(3, 90))
    with torch.inference_mode():
        whole, rounded = hidden(decoder, tokens), hidden(decoder, tokens, torch.bfloat16)
        assert 1e-6 < (rounded - whole).norm() / whole.norm() < 1e-2
        monkeypatch.setenv("PTST_KERNELS", "reference")
        assert Forward(decoder).cache_dtype == torch.float32


def test_a_weight_too_large_for_float16_is_not_cut(monkeypatch):
    monkeypatch.setattr(module, "AMX", False)
    w = torch.randn(8, 16).bfloat16()
    w[3, 4] = 1e5
    x = torch.randn(2, 16)
    torch.testing.assert_close(half_width_product(w)(x), x @ w.float().t())


def test_weights_are_packed_once_for_all_engines_and_anew_when_they_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AMX", False)  # for tolerances of float32
    decoder = load_decoder(write_tiny_model(tmp_path), torch.bfloat16)
    x = torch.randn(2, decoder.config.hidden_size)
    first = Forward(decoder)
    assert Forward(decoder).logits is first.logits and Forward(decoder).layers is first.layers
    trained = decoder.layers[0].mlp.down_proj.weight

    def train(w: torch.nn.Parameter) -> None:
        """By the trainer's own optimizer, which writes without a word."""
        Forward(decoder)
        w.requires_grad_(True).grad = torch.ones_like(w)
        torch.optim.AdamW([w], lr=0.5, fused=True).step()

    for change in (lambda w: w.add_(1), lambda w: setattr(w, "data", w * 2), train):
        with torch.no_grad():
            change(trained)
        product = Forward(decoder).layers[0].products[3]
        wide = decoder.layers[0].mlp.down_proj.weight.float()
        h = torch.randn(2, wide.shape[1])
        torch.testing.assert_close(product(h), h @ wide.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(Forward(decoder).logits(x), first.logits(x))


def test_weights_are_joined_once_and_in_place():
    parts = [torch.nn.Parameter(torch.randn(n, 4)) for n in (3, 1, 2)]
    before = torch.cat([p.detach() for p in parts])
    whole = join(parts)
    assert torch.equal(whole, before)
    with torch.no_grad():
        parts[1].fill_(7.0)
    assert (whole[3] == 7).all()
    assert join(parts).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("amx", [module.AMX, False])
def test_without_room_for_a_packed_copy_there_is_none(tmp_path, amx, monkeypatch, capsys):
    """The same function over the weights as they are: nothing of their size is allocated, and it is told."""
    exact, half = rounded_model(write_tiny_model(tmp_path))
    monkeypatch.setattr(module, "AMX", amx)
    say_once.cache_clear()
    tokens = list(range(3, 90))
    with torch.inference_mode():
        packed = hidden(half, tokens)
        module._PACKED.clear()
        monkeypatch.setattr(lean_products, "free_memory", lambda device: 1000)
        monkeypatch.setattr(lean_products, "WIDENED", 5 * 32)  # five rows at a time
        monkeypatch.setattr(module, "half_width_product", None)  # would pack
        lean = hidden(half, tokens)
        wanted = hidden(exact, tokens)
    assert (lean - wanted).norm() / wanted.norm() < (2e-2 if amx else 1e-5)
    assert (lean - packed).norm() / packed.norm() < (2e-2 if amx else 1e-5)
    said = " ".join(capsys.readouterr().err.split())
    assert "a packed copy of the weights takes 0.0 GB, and 0.0 GB are free: answers are computed without one" in said
