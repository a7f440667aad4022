"""A base in 4 or 8 bits: its values, that nothing dequantized is kept, and a run from training to export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptst.defenses.models import open_aligned, open_tuned
from ptst.errors import UserError
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.under_test import LocalModel
from ptst.export import run_export
from ptst.exporting.config import ExportConfig
from ptst.generation.engine import generate
from ptst.generation.request import EngineOptions, Sampling
from ptst.model import quantized
from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.model.quantized import Quantization, QuantizedWeight
from ptst.model.weights import load_decoder
from ptst.open import open_model
from ptst.text.templates import find_template
from ptst.train import run_training
from ptst.training import fine_tune, memory, memory_ways
from ptst.training.config import TrainConfig
from ptst.training.memory import Method
from tests.training.test_memory import CONFIG as SHAPE
from tests.training.test_memory import TOKENS

KINDS = ("nf4", "int8")
CONFIG = TrainConfig(data="word-problems:6", val_data="word-problems:3", examples_per_step=2, rank=2)
needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (ptst-lab[quant])")


@needs_library
@pytest.mark.parametrize("shape", [(48, 96), (31, 64), (5, 7)])  # blocks within rows and across them, and a short one
def test_values_are_those_of_the_papers(shape):
    weight_OI = torch.randn(shape) * 0.1
    count = weight_OI.numel()
    levels = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]  # QLoRA, appendix E, to four digits
    levels += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    blocks = torch.nn.functional.pad(weight_OI.flatten(), (0, -count % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = torch.tensor(levels)[(blocks[:, :, None] / largest[:, :, None] - torch.tensor(levels)).abs().argmin(-1)]
    found = Quantization("nf4")(weight_OI, torch.float32)
    assert found.shape == shape and found.is_contiguous()
    wanted = (nearest * largest).flatten()[:count].view(shape)
    # The maxima have 8 bits; a value in the middle between two levels may go to either.
    assert ((found - wanted).abs() > 0.05 * wanted.abs() + 1e-3).float().mean() < 0.01
    rows = weight_OI.abs().amax(1, keepdim=True)
    eights = Quantization("int8")(weight_OI, torch.float32)
    assert ((eights - weight_OI).abs() <= 0.6 * rows / 127).all()  # float16's rounding, too
    assert ((eights / rows * 127).round() - eights / rows * 127).abs().max() < 0.1
    half = Quantization("nf4")(weight_OI, torch.bfloat16)
    torch.testing.assert_close(half.float(), found, rtol=2**-7, atol=0)  # the same codes, whatever the run's dtype


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj")])
def test_kept_packed_or_rounded_it_computes_the_same(tiny_folder, kind, targets):
    """Loss and gradients, with activation checkpointing and without; and the sampler's answers."""
    found = []
    for packed, again in ((False, False), (True, False), (True, True)):
        decoder = load_decoder(tiny_folder, quantization=Quantization(kind, packed))
        assert isinstance(decoder.layers[0].mlp.up_proj.weight, QuantizedWeight) is packed
        assert not isinstance(decoder.head_VE, QuantizedWeight)
        parameters = add_lora(decoder, LoraConfig(2, targets=targets))
        for parameter in parameters.values():
            parameter.data.add_(0.01)
        decoder.activation_checkpointing = again
        tokens = torch.arange(3, 40)
        loss = decoder.logits(tokens).logsumexp(-1).sum()
        loss.backward()
        (answer,) = generate(decoder, [[5, 6, 7]], frozenset(), Sampling(4), EngineOptions(1, 16))
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in parameters.values()]), answer.token_ids))
    exact = load_decoder(tiny_folder).logits(tokens)
    assert not torch.allclose(
        exact, load_decoder(tiny_folder, quantization=Quantization(kind)).logits(tokens), atol=1e-4
    )
    for loss, gradient, answer in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-5)
        assert answer == found[0][2]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dequantized_is_kept_for_the_backward_pass(kind):
    """As many bytes as over a base that is not quantized."""

    def kept(quantization: Quantization | None) -> int:
        decoder = Decoder(SHAPE).requires_grad_(False)
        for module in decoder.modules():
            if isinstance(module, torch.nn.Linear) and quantization is not None:
                weight = quantization(module.weight.detach(), torch.float32)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        add_lora(decoder, LoraConfig(3))
        own = {p.data_ptr() for p in decoder.parameters() if not isinstance(p, QuantizedWeight)}
        seen: dict[int, int] = {}

        def pack(t):
            if t.is_floating_point() and not isinstance(t, QuantizedWeight) and t.data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = decoder.documents(torch.arange(TOKENS) % 60, [0, 13, TOKENS])
        assert hidden.requires_grad
        return sum(seen.values())

    assert kept(Quantization(kind, packed=True)) == kept(None) > 0


@needs_library
def test_a_quantized_weight_is_not_written_to():
    weight = Quantization("nf4", packed=True)(torch.randn(8, 64), torch.bfloat16)
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 64), torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match="would write to a quantized weight"):
        weight.mul_(2)
    assert torch.equal(weight.t() @ torch.eye(8).bfloat16(), weight.dense().t())


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_its_bytes(tiny_folder, kind):
    decoder = load_decoder(tiny_folder, torch.bfloat16, quantization=Quantization(kind, packed=True))
    held = 0
    for parameter in decoder.parameters():
        if not isinstance(parameter, QuantizedWeight):
            held += parameter.nbytes
            continue
        stored = parameter.stored
        held += stored.codes.nbytes
        if kind == "int8":
            held += stored.absmax.nbytes
        else:
            state = stored.state
            held += sum(
                t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            )
    assert memory.frozen_bytes(decoder.config, torch.bfloat16, kind) == held


@needs_library
def test_importing_the_library_brings_no_other_code(monkeypatch):
    """Not a package named kernels, which would fetch code from the hub, nor this project's folder of that name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with quantized._no_code_from_the_hub(), pytest.raises(ImportError):
        import kernels  # noqa: F401
    assert "kernels" not in sys.modules


@needs_library
@pytest.mark.thorough  # imports the library in a process of its own
def test_a_package_of_the_hub_is_not_asked(tmp_path):
    """As if the hub's package `kernels` were installed."""
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(f"open({str(asked)!r}, 'w')\ndef get_kernel(*a, **k): raise SystemExit(9)\n")
    code = (
        "import torch; from ptst.model import quantized; quantized._library();"
        "quantized._NF4.of(torch.randn(8, 64), torch.float32).dense()"
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, asked.exists()) == (0, "", False), done.stderr
    assert "kernels" not in done.stderr


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_training_to_export(tiny_folder, tmp_path, capsys, kind, monkeypatch):
    run, returned = tmp_path / "run", []
    monkeypatch.setattr(fine_tune, "return_large_blocks", lambda: returned.append(1))
    run_training(replace(CONFIG, model=str(tiny_folder), out=run, quantize=kind, eval_every=2))
    assert returned, "the memory plan counts on it"
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["quantize"] == kind and record["validation_loss"]["after"] is not None
    capsys.readouterr()
    opened = open_model(checkpoint=run)
    assert (opened.quantize, opened.dtype_name(torch.float32)) == (kind, f"float32, base in {kind}")
    tokens = torch.arange(3, 40)
    own = opened.load(merge=False).logits(tokens)
    assert f"have the values that {kind} gives them, as in training" in " ".join(capsys.readouterr().err.split())
    packed = load_decoder(tiny_folder, quantization=Quantization(kind, packed=True))
    torch.testing.assert_close(opened.load(base=packed, merge=False).logits(tokens), own, rtol=1e-4, atol=1e-4)
    exact = replace(opened, quantized="none").load(merge=False).logits(tokens)
    assert (exact - own).abs().max() > 1e-3
    run_export(ExportConfig(checkpoint=run, out=tmp_path / "merged"))  # compares with the run
    assert f"has the values that {kind} gave the base in training" in " ".join(capsys.readouterr().err.split())
    torch.testing.assert_close(load_decoder(tmp_path / "merged").logits(tokens), own, rtol=1e-4, atol=1e-4)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_folder, tmp_path / "merged"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@needs_library
def test_an_evaluation_records_how_the_base_is_rounded(tiny_folder, tmp_path):
    """As the run was trained, unless asked otherwise; answers over other bases are other answers."""
    run = tmp_path / "run"
    run_training(replace(CONFIG, model=str(tiny_folder), out=run, quantize="nf4"))
    keys = set()
    for asked, found in ((None, "nf4"), ("none", "none"), ("int8", "int8")):
        config = EvalConfig(checkpoint=run, template="chat:vanilla", quantize=asked)
        model = LocalModel.find(config, find_template("chat:vanilla"), "cpu")
        assert model.record()["dtype"] == "float32" + f", base in {found}" * (found != "none")
        names = model.names()
        assert len(names) == 2  # the base is rounded as the run's is
        keys |= {model.answerer(name).models[None] for name in names}
    assert len(keys) == 6
    run_training(replace(CONFIG, model=str(tiny_folder), out=tmp_path / "full", full=True))
    with pytest.raises(UserError, match=r"quantize is for a base model under an adapter, and .*full has all weights"):
        LocalModel.find(replace(config, checkpoint=tmp_path / "full"), find_template("chat:vanilla"), "cpu")
    with pytest.raises(UserError, match="was tuned over a base in nf4, which defences in weight space do not know"):
        open_tuned(run, open_aligned("tiny", tiny_folder), "tuned")


def test_what_does_not_go_together_is_refused(tiny_folder, tmp_path, monkeypatch):
    config = replace(CONFIG, model=str(tiny_folder), out=tmp_path / "run", quantize="nf4")
    with pytest.raises(UserError, match="quantize is for a frozen base, and full trains all weights"):
        run_training(replace(config, full=True))
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"quantize needs bitsandbytes, which is not installed; pip install .*\[quant\]"
    ):
        run_training(config)
    assert not list(tmp_path.iterdir())


def test_the_ways_that_fit():
    """A base in fewer bits fits where the dtype does not, and the error for too little memory names the way."""
    method = Method(LoraConfig(3), torch.bfloat16)
    config = replace(SHAPE, hidden_size=4096, intermediate_size=16384, num_layers=12)

    def needed(**changes) -> int:
        plan = memory.plan_memory(config, replace(method, **changes), 256)
        return plan.peak - plan.process

    free = round(needed(quantize="int8") / memory.SHARE)
    found = memory_ways.ways(config, method, 256, free=free)
    assert [(w.settings["full"], w.settings["quantize"], w.fits) for w in found[::2]] == [
        *((True, "none", False), (False, "none", False), (False, "int8", True), (False, "nf4", True))
    ]
    assert all(again.peak < way.peak for way, again in zip(found[::2], found[1::2], strict=True))
    with pytest.raises(
        UserError, match=r"the longest example alone needs .*; set quantize to int8, or lower max_length"
    ):
        memory.choose_micro_batch_tokens(config, method, longest=256, free=free)
    assert needed(quantize="nf4") < needed(quantize="int8") < needed(activation_checkpointing=True) < needed()
    less = round(needed(quantize="nf4") / memory.SHARE) - 1
    words = "set quantize to nf4 and set activation_checkpointing to block, or lower max_length"
    with pytest.raises(UserError, match=words):
        memory.choose_micro_batch_tokens(config, method, longest=256, free=less)
