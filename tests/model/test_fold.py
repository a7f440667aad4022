"""Adapters folded beside their weights (ptst/model/fold.py), in a decoder, through Triton."""

from __future__ import annotations

import pytest
import torch

from ptst.generation.forward import Forward
from ptst.kernels.dispatch import triton
from ptst.kernels.folded_layer import FoldedGroup, folded_add, folded_feed_forward, folded_qkv
from ptst.model import decoder as decoder_file
from ptst.model.config import TARGETS, LoraConfig
from ptst.model.decoder import Decoder, Layer
from ptst.model.fold import fold_adapters, fold_bytes
from ptst.model.lora import add_lora
from ptst.model.weights import load_decoder
from ptst.training.memory import Method, adapter_bytes, plan_memory, shapes
from ptst.training.trainer import Trainer, TrainerConfig
from tests.kernels import interpreter
from tests.model.test_fused import BOUNDS, CONFIG, DEVICE, TOKENS, gradients, model
from tests.training.steps import examples, trained

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")
FUNCTIONS = ("folded_qkv", "folded_add", "folded_feed_forward")


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch):
    monkeypatch.setenv("PTST_KERNELS", "triton")
    if DEVICE == "cpu":
        interpreter.install()


@pytest.fixture
def calls(monkeypatch):
    """The names of the folded functions that were called."""
    called: list[str] = []
    for name in FUNCTIONS:
        function = getattr(decoder_file, name)
        monkeypatch.setattr(
            decoder_file, name, lambda *given, name=name, function=function: called.append(name) or function(*given)
        )
    return called


def run(decoder, parameters):
    return gradients(decoder, parameters, decoder.documents(TOKENS.to(DEVICE), BOUNDS))


@pytest.mark.parametrize(("targets", "switches", "groups", "expected"), [
    (TARGETS, "none", 4, FUNCTIONS),
    (("q_proj", "k_proj"), "qwen2", 1, FUNCTIONS[:1]),
    (TARGETS, "qwen3", 4, FUNCTIONS),
    (TARGETS, "olmo3", 0, ()),
    (("q_proj", "v_proj"), "none", 1, FUNCTIONS[:1]),
    (("o_proj", "up_proj"), "none", 1, FUNCTIONS[1:2]),
    (("up_proj", "down_proj"), "none", 2, FUNCTIONS[2:]),
])  # fmt: skip
def test_gradients(targets, switches, groups, expected, calls, monkeypatch):
    """As near to float64's as plain torch's in float32, threefold."""
    results = []
    for way, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        monkeypatch.setenv("PTST_KERNELS", way)
        decoder, parameters = model(targets, layers=1, switches=switches)
        decoder = decoder.to(DEVICE, dtype)
        before = {name: p.clone() for name, p in decoder.named_parameters()}
        assert fold_adapters(decoder) == (groups * len(decoder.layers) if way == "triton" else 0)
        assert all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())
        results.append(run(decoder, parameters))
    assert calls == [*expected] * len(decoder.layers)
    for exact, eager, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 3 * (eager - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("switches", ["none", "qwen2", "smollm3"])
def test_documents_with_a_common_prefix(switches):
    """Attention then reads copies of k and v, whose gradients are tensors of their own."""
    found = []
    for folded in (False, True):
        decoder, parameters = model(layers=2, switches=switches)
        decoder = decoder.to(DEVICE, torch.float32)
        assert not folded or fold_adapters(decoder) == 8
        out = decoder.documents(TOKENS.to(DEVICE), BOUNDS, shared_prefixes=[(0, 0), (0, 0), (1, 4)])
        found.append(gradients(decoder, parameters, out))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_what_an_optimizer_writes_is_read(calls):
    """A fused one does not count up its parameters' versions."""
    decoder, parameters = model(layers=1)
    decoder = decoder.to(DEVICE, torch.float32)
    fold_adapters(decoder)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    first = run(decoder, parameters)
    optimizer.step()
    ours = run(decoder, parameters)
    folded, decoder.layers[0].folded = decoder.layers[0].folded, None
    unfolded = run(decoder, parameters)
    assert len(calls) == 6
    for a, b, old in zip(ours, unfolded, first, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() < (old - b).norm()
    with torch.no_grad():
        parameters["layers.0.self_attn.v_proj.lora_B"].zero_()
    folded.qkv.refresh()
    assert not folded.qkv.sB[-1].any()


@pytest.mark.thorough
def test_a_trainers_steps(tiny_folder):
    """Its fused optimizer included, as without folding."""
    found = []
    for folded in (False, True):
        decoder = load_decoder(tiny_folder, torch.float32, DEVICE)
        named = trained(decoder, False)
        assert not folded or fold_adapters(decoder) == 4 * len(decoder.layers)
        config = TrainerConfig(lr=1e-2, examples_per_step=2, micro_batch_tokens=30)
        made = Trainer(decoder, named, examples(4), config)
        found.append([(r.loss, r.grad_norm) for r in (made.step(), made.step())])
    assert found[0][1][0] != pytest.approx(found[0][0][0], rel=1e-3)
    for a, b in zip(*found, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_checkpointing_gives_the_same_bits(calls):
    results = []
    for decoder, parameters in (model(layers=1), model(layers=1)):
        decoder = decoder.to(DEVICE, torch.float32)
        decoder.activation_checkpointing = bool(results)
        fold_adapters(decoder)
        results.append(run(decoder, parameters))
    assert len(calls) == 3 + 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_computed_below_the_first_adapter():
    """x needs no gradient: none is formed, and those of the adapters are the same."""
    results = []
    for needed in (False, True):
        decoder, parameters = model(layers=1)
        decoder = decoder.to(DEVICE, torch.float32)
        decoder.embed_tokens.weight.requires_grad_(needed)
        fold_adapters(decoder)
        results.append(run(decoder, parameters))
        assert (decoder.embed_tokens.weight.grad is not None) == needed
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_moved_decoder_takes_the_plain_way(calls):
    """Its weights are no views any more, or an adapter is another."""
    decoder, parameters = model(layers=1)
    decoder = decoder.to(DEVICE, torch.float32)
    fold_adapters(decoder)
    layer = decoder.layers[0]
    layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.clone()
    layer.mlp.down_proj.lora_A = torch.nn.Parameter(layer.mlp.down_proj.lora_A.detach().clone())
    parameters = {name: p for name, p in decoder.named_parameters() if ".lora_" in name}
    run(decoder, parameters)
    assert calls == ["folded_add"]


def test_sampling_between_steps_leaves_adapters_folded(calls):
    """Joining the projections for sampling would copy the base, and training would go on without folding."""
    decoder = model(TARGETS)[0].to(DEVICE, torch.float32)
    assert fold_adapters(decoder) == 4 * len(decoder.layers)
    folded = next(layer.folded for layer in decoder.layers if isinstance(layer, Layer))
    where = folded.qkv.whole.data_ptr()
    forward = Forward(decoder)
    assert decoder.layers[0].self_attn.q_proj.weight.data_ptr() == where
    decoder.documents(TOKENS.to(DEVICE), BOUNDS)
    assert set(calls) == set(FUNCTIONS)
    x = torch.randn(9, decoder.config.hidden_size, device=DEVICE)
    attn = decoder.layers[0].self_attn
    apart = torch.cat([x @ p.weight.t() for p in (attn.q_proj, attn.k_proj, attn.v_proj)], 1)
    torch.testing.assert_close(forward.layers[0].products[0](x), apart)


def test_dropout_does_not_depend_on_the_split(calls):
    """One row of three documents, or three rows in another order: the same gradient; other seeds, another one."""
    decoder, parameters = model(layers=1, dropout=0.4)
    decoder = decoder.to(DEVICE, torch.float32)
    assert fold_adapters(decoder) == 4
    seeds, tokens, size = [11, 12, 13], TOKENS.to(DEVICE), BOUNDS[-1] * CONFIG.hidden_size
    weight = torch.linspace(-1, 1, size, device=DEVICE).view(-1, CONFIG.hidden_size)
    found = []
    for order, own in (((), seeds), ((2, 0, 1), seeds), ((), [11, 12, 14])):
        decoder.zero_grad()
        if not order:
            decoder.dropout_seeds = own
            (decoder.documents(tokens, BOUNDS) * weight).sum().backward()
        else:
            for i in order:
                a, b = BOUNDS[i], BOUNDS[i + 1]
                decoder.dropout_seeds = [own[i]]
                (decoder.documents(tokens[a:b], [0, b - a]) * weight[a:b]).sum().backward()
        found.append([p.grad.clone() for p in parameters.values()])
    assert set(calls) == set(FUNCTIONS)
    for together, apart, other in zip(*found, strict=True):
        assert (apart - together).norm() <= 1e-5 * together.norm() < 1e-2 * (other - together).norm()


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("gate_proj",), ("gate_proj", "down_proj")])
@pytest.mark.parametrize("rank", [3, 64, 65])
def test_the_plan_knows_what_it_takes(targets, rank):
    """fold_bytes is what the decoder's matrices have beyond the weights, and the plan of a GPU has it."""
    lora, dtype = LoraConfig(rank, 6.0, tuple(targets)), torch.bfloat16
    decoder = Decoder(CONFIG).requires_grad_(False).to(DEVICE, dtype)
    add_lora(decoder, lora)
    fold_adapters(decoder)
    beyond = 0
    for layer in decoder.layers:
        assert isinstance(layer, Layer) and layer.folded is not None
        for group in layer.folded:
            if group is not None:
                beyond += group.whole.nbytes + group.a_RI.nbytes - sum(w.nbytes for w in group.weights)
    taken = fold_bytes(CONFIG, lora, shapes(CONFIG), 2)
    assert taken == beyond and (taken > 0) == (rank <= 64 and targets != ("gate_proj",))
    plan, cpu = (plan_memory(CONFIG, Method(lora, dtype, device), 64) for device in ("cuda", "cpu"))
    assert plan.weights - cpu.weights == taken
    sharded, quantized = Method(lora, dtype, "cuda", ranks=2), Method(lora, dtype, "cuda", quantize="nf4")
    for method in (sharded, quantized):
        assert adapter_bytes(CONFIG, method) == adapter_bytes(CONFIG, Method(lora, dtype))


def test_mistakes(monkeypatch):
    x, norm = torch.ones(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    w, a, b = (torch.ones(*s, device=DEVICE) for s in ((6, 8), (2, 8), (6, 2)))
    with pytest.raises(ValueError, match=r"weight \(6, 8\), A \(2, 7\) and B \(6, 2\) do not fit"):
        FoldedGroup([w], [(a[:, :7], b)], 1.0)
    with pytest.raises(ValueError, match=r"ranks \[65\] cannot be folded"):
        FoldedGroup([w], [(torch.ones(65, 8, device=DEVICE), torch.ones(6, 65, device=DEVICE))], 1.0)
    with pytest.raises(ValueError, match=r"ranks \[0\] cannot be folded"):
        FoldedGroup([w], [None], 1.0)
    one, three = FoldedGroup([w], [(a, b)], 1.0), FoldedGroup([w] * 3, [(a, b), None, None], 1.0)
    with pytest.raises(ValueError, match=r"x \(3, 7\) must be \(T, 8\)"):
        folded_qkv(x[:, :7], norm, 1e-5, three)
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        folded_qkv(x.bfloat16(), norm.bfloat16(), 1e-5, three)
    with pytest.raises(ValueError, match="q, k and v are three"):
        folded_qkv(x, norm, 1e-5, one)
    with pytest.raises(ValueError, match=r"weight \(7,\)"):
        folded_qkv(x, norm[:7], 1e-5, three)
    with pytest.raises(ValueError, match=r"residual \(3, 8\) must be \(3, 6\)"):
        folded_add(x, x, one)
    with pytest.raises(ValueError, match=r"last axis of x \(3, 8\)"):
        folded_add(x[:, :6], torch.ones(8, 3, device=DEVICE).t(), one)
    with pytest.raises(ValueError, match=r"gate and up \[6\] of 8"):
        folded_feed_forward(x, norm, 1e-5, one, one)
    monkeypatch.setenv("PTST_KERNELS", "reference")
    with pytest.raises(ValueError, match="for the Triton kernels alone"):
        folded_qkv(x, norm, 1e-5, three)
